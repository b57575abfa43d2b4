#!/bin/bash
# Makes one virtual environment per rival, from their own PyPI packages: environments.sh FOLDER [RIVAL ...]
#
# PYTHON names the interpreter, TORCH another build of PyTorch, such as `torch==2.13.0+cpu`. deepfocus
# and wechsel ask for `fasttext`, which has no wheel: `fasttext-numpy2-wheel` is the same library,
# built for NumPy 2.
#
# Without a network: WHEELS names a folder of wheels, and the environments see the packages of PYTHON
# (PyTorch, transformers, datasets, numba, scikit-learn). `environments.sh --download WHEELS 3.12`
# fills such a folder for that version of Python on Linux (x86-64, 40 MB).
set -euo pipefail

declare -A needs=(
    [mergekit]='immutables peft pydantic pydantic-core annotated-types typing-inspection'
    [deepfocus]='fasttext-numpy2-wheel==0.9.2 entmax fastdist print-on-steroids loguru regex'
    [wechsel]='fasttext-numpy2-wheel==0.9.2 gensim nltk smart-open regex'
    [vocabtrimmer]=''
)
declare -A packages=(
    [mergekit]=mergekit==0.1.5
    [deepfocus]=deepfocus==1.0.1
    [wechsel]=wechsel==0.0.4
    [vocabtrimmer]=vocabtrimmer==0.0.2
)
torch=${TORCH:-torch}
declare -A installed=( # beside what is in `needs`, where there is a network
    [mergekit]="${packages[mergekit]} $torch"
    [deepfocus]="$torch transformers datasets requests numpy<2.4 numba scipy tqdm"
    [wechsel]="$torch transformers datasets requests numpy<2.4 scipy scikit-learn tqdm"
    [vocabtrimmer]="$torch transformers<5 datasets<4 huggingface_hub<1 sentencepiece tokenizers pandas requests tqdm"
)

if [ "${1:-}" = --download ]; then
    folder=${2:?usage: environments.sh --download FOLDER VERSION} version=${3:?version of Python}
    for rival in mergekit deepfocus wechsel; do
        for package in ${packages[$rival]} ${needs[$rival]}; do
            "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: -d "$folder" \
                --python-version "$version" --implementation cp --platform manylinux_2_28_x86_64 \
                --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
                --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$package"
        done
    done
    exit
fi

folder=${1:?usage: environments.sh FOLDER [mergekit deepfocus wechsel vocabtrimmer]}
shift
[ $# -gt 0 ] || set -- mergekit deepfocus wechsel vocabtrimmer
for rival; do
    [ -n "${packages[$rival]:-}" ] || { echo "unknown rival '$rival'" >&2 && exit 2; }
    environment=$folder/$rival
    [ -f "$environment/.complete" ] && continue
    if [ -n "${WHEELS:-}" ]; then
        "${PYTHON:-python3}" -m venv --system-site-packages "$environment"
        offline=(--no-index --find-links "$WHEELS")
        # shellcheck disable=SC2086
        "$environment/bin/pip" install -q --no-deps "${offline[@]}" ${needs[$rival]} ${packages[$rival]}
    else
        "${PYTHON:-python3}" -m venv "$environment"
        # shellcheck disable=SC2086
        "$environment/bin/pip" install -q ${installed[$rival]} ${needs[$rival]}
        "$environment/bin/pip" install -q --no-deps "${packages[$rival]}"
    fi
    touch "$environment/.complete"
    echo "$rival: ${packages[$rival]}"
done

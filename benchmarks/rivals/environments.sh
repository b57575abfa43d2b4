#!/bin/bash
# Makes one virtual environment per rival, from their own PyPI packages: environments.sh FOLDER [RIVAL ...]
#
# deepfocus and wechsel ask for `fasttext`, which has no wheel: `fasttext-numpy2-wheel` is the same
# library, built for NumPy 2. TORCH names another build of PyTorch, such as
# `torch==2.13.0+cpu`; PYTHON the interpreter (3.11).
set -euo pipefail
folder=${1:?usage: environments.sh FOLDER [mergekit deepfocus wechsel vocabtrimmer]}
shift
python=${PYTHON:-python3}
torch=${TORCH:-torch}

make() { # name, packages
    local environment=$folder/$1
    shift
    [ -f "$environment/.complete" ] && return
    "$python" -m venv "$environment"
    "$environment/bin/pip" install -q "$@"
}

complete() { # name, package: installs the rival itself without what replaces its requirements
    local environment=$folder/$1
    [ -f "$environment/.complete" ] && return
    "$environment/bin/pip" install -q --no-deps "$2"
    touch "$environment/.complete"
    echo "$1: $2"
}

for rival in "${@:-mergekit deepfocus wechsel vocabtrimmer}"; do
    for name in $rival; do
        case $name in
        mergekit)
            make mergekit mergekit==0.1.5 "$torch"
            complete mergekit mergekit==0.1.5
            ;;
        deepfocus)
            make deepfocus "$torch" transformers datasets entmax fasttext-numpy2-wheel==0.9.2 fastdist requests \
                'numpy<2.4' numba scipy tqdm print-on-steroids regex
            complete deepfocus deepfocus==1.0.1
            ;;
        wechsel)
            make wechsel "$torch" transformers datasets fasttext-numpy2-wheel==0.9.2 requests gensim 'numpy<2.4' \
                scipy scikit-learn nltk tqdm
            complete wechsel wechsel==0.0.4
            ;;
        vocabtrimmer)
            make vocabtrimmer "$torch" 'transformers<5' 'datasets<4' 'huggingface_hub<1' sentencepiece tokenizers pandas requests tqdm
            complete vocabtrimmer vocabtrimmer==0.0.2
            ;;
        *)
            echo "unknown rival '$name'" >&2
            exit 2
            ;;
        esac
    done
done

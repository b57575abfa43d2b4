"""One decoder for several families: its constants, its pure functions, and Hugging Face folders in
and out.
"""

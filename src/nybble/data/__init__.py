"""Text for training, calibration, validation and test: from files and data sets to token sequences.

In the order of the data flow; a module imports only modules above it:
    files      rows of .jsonl, .json, .csv and .parquet files
    chat       conversations -> tokens, through the model's chat template
    splits     training, validation and test documents
    wikitext   WikiText without its tokenization marks
    sources    what --data can name -> documents
    packing    documents -> token sequences of equal length
    sampling   seeded order of sequences
    mixture    several sources, mixed by share
    generate   token sequences that the model generates itself
    prepare    all of the above for one run
"""

"""The version of what turns replies into scores: `records.table` puts no unlike versions on one page."""

# Of the rows that launch/evaluate.py writes; raised by every change after which the same model may score otherwise.
# 1 (rows without a version): a reply was decoded alone and lost its first blank. 2: it is what it adds to its prompt.
VERSION = 2

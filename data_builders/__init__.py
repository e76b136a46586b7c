"""Builders of data sets: rows generated from scratch, or converted from the files that their authors released.

Each builder writes NAME_train.json, NAME_valid.json and NAME_test.json, a JSON list with one row a line;
NAME_manifest.json, which records how they were made; and NAME_card.md, a data card.
"""

"""Data for the three tasks: made from scratch, or from the files that their authors released.

Each builder writes NAME_train.json, NAME_valid.json and NAME_test.json, a JSON list with one row a
line, NAME_manifest.json, which says how they were made, and NAME_card.md, which says it to people.
"""

"""Data sets for the tasks: generated, or converted from released files. `coconut data` lists the builders.

Each builder writes NAME_train.json, NAME_valid.json and NAME_test.json (a JSON list with one row a line),
NAME_manifest.json with the settings and statistics, and NAME_card.md, the same for people.
"""

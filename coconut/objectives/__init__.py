"""Terms of the training loss. Each module holds one class `Objective`, which methods name in their terms.

- tokens: next-token prediction of one form
- states: hidden states of one form held to those of another (CODI)
- steps: a decoder writes each step from the thoughts that stand for it (SIM-CoT)

`training_model` puts a model and its terms together.
"""

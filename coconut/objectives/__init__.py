"""Terms of the training loss. Each module holds one class `Objective`, which methods name in their terms.

- tokens: next-token prediction of one form
- states: hidden states of one form held to those of another (CODI)
- cache: keys and values of the thoughts held to those of the written chain (KaVa)
- spans: each thought held to the words of the chain that it stands for (MUX, LOTUS)
- steps: a decoder writes each step from the thoughts that stand for it (SIM-CoT)
- random_token: a word of each group of the chain, predicted before its thought (CoLaR)
- latent: merged embeddings, predicted by a Gaussian head (CoLaR)
- multi_token: all words of each group, predicted by a head (C-MTP)

`training_model` puts a model and its terms together.
"""

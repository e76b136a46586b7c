"""Choosing how to answer each question: AdaReasoner's policy beside a frozen model (Wang et al., arXiv 2505.17312)."""

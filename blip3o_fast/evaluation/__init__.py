"""How good generated embeddings are: metrics, the baselines beside them, and the evaluation of a
trained model.

Every number that this package reports stands next to what chance and the trivial baselines reach,
because a cosine alone says nothing: embeddings of natural pictures resemble each other before
anything is learned.
"""

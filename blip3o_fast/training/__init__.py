"""Training a BLIP3-o DiT on embeddings with the HuggingFace Trainer.

`run.train(TrainSettings(...))` is the whole job; `trainer.BLIP3oTrainer` is the Trainer alone. Only `trainer`
and `callbacks` import transformers, which takes seconds: everything that can be wrong with a run's settings
is found by `arguments` and `run` before that.
"""

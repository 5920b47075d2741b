"""The recipe of glm-mini, the small GLM that ships with the workbench: corpus, tokenizer, training, evaluation.

Run `python -m glm_core.minimodel all` for everything, or one of corpus, tokenizer, train, evaluate.
"""

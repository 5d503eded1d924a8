"""Names that reports, recipes and models share: kinds of units, objectives, a file. It imports nothing heavy."""

KINDS = ("heads", "kv_groups", "experts", "ffn", "layers", "hidden", "embedding_rank", "vocab")
MODULE_KINDS = ("channels", "inputs")  # of any module, by tracing
ATTENTION_KINDS = ("heads", "kv_groups")
TAGS, ANSWERS = "token_classification", "question_answering"  # objectives that the data alone decide
WRITES = "seq2seq_lm"  # that of a model which reads one text and writes another
DECISION, DECISION_SCHEMA = "decision.json", "ibprune.decision/1"  # what decided which units stay (`decisions.py`)

"""The offline stage: read, tokenize and shard text. No torch."""

if __name__ != "megatrain.data_prep":
    raise ImportError(f"import megatrain.data_prep, not {__name__}: the package is `megatrain`")

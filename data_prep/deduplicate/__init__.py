"""Removing what is there more than once: documents that are the same or almost the same, and single lines.

It takes two passes over a unit, with exchanges of keys between all units in between:
1. keys.document_keys of every batch of a unit, and keys.write_keys into its folder;
2. duplicates.find_duplicates: which rows of which unit go;
3. with paragraphs: paragraphs.line_keys and write_line_keys in the first pass, find_paragraphs after step 2;
4. in the second pass over a unit's batches: steps.RemovedDocuments, and steps.RepeatedLines.
Without paragraphs no second pass is needed: Duplicates.kept says which rows to leave out of what the first pass left.
"""

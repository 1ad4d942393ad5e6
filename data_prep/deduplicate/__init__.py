"""Removing what is there more than once: whole documents, documents almost alike, and single lines.

Who calls it goes through four steps; the first and the last are part of a unit's own work:
1. `keys.document_keys` and `keys.write_keys`: what a unit's documents are compared by, into the unit's folder.
2. `duplicates.find_duplicates`: reads all units' keys, and says which rows of which unit go.
3. `paragraphs.paragraph_keys`, `write_paragraph_keys`, `find_paragraphs`: the same of lines, among documents that stay.
4. `paragraphs.RepeatedParagraphs`: the step that takes the lines out.
"""

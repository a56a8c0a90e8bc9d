"""Names and layouts of public weight files, one module a library, brought to this project's own (DINOv2's) and back.

Everything here works on state dicts in memory; reading files is `dinoreg.models.weights`'s part.
"""

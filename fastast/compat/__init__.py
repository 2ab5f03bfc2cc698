"""Other projects' front ends, by their names and call signatures, on fastast's filterbank.

Change the import and nothing else::

    from fastast.compat import kaldi                 # for torchaudio.compliance.kaldi
    from fastast.compat import ASTFeatureExtractor   # for transformers' class of that name
"""

from fastast.compat import kaldi
from fastast.compat.ast_feature_extractor import ASTFeatureExtractor

__all__ = ["ASTFeatureExtractor", "kaldi"]

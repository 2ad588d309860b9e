"""What the head of vector-quantised logits can be asked for."""

from dataclasses import dataclass

from xhead.heads.codes import STARTS

TOKEN_BIASES = ("none", "frequency", "learned")
MAPPINGS = ("fixed", "reassigned", "learned")


@dataclass(frozen=True)
class VQConfig:
    """Options of the head `"vq"`.

    Args:
        codebook_size: the number of codes K, at most the number of tokens.
        start: how tokens are put into codes: `"kmeans"` (mini-batch k-means of the replaced projection's rows, with
            scikit-learn), `"frequency"` (tokens of like counts together, each code with about the same count) or
            `"random"`. Each row of the codebook starts as the mean of its tokens' rows.
        frequent: so many of the most frequent tokens have a code of their own, for good.
        token_bias: b_v. `"none"` (0: the tokens of a code are equally probable, always), `"frequency"` (the logarithm
            of the token's count plus one) or `"learned"` (V parameters, that start from the counts and from the
            replaced projection's bias, where there are such).
        mapping: `"fixed"`, or every `reassign_every` training forwards anew: `"reassigned"` puts each token where its
            contexts since the last time would have been most probable, `"learned"` next to a row of its own, (V, D)
            parameters that are trained with the gradient of the token's logit (straight-through). Both keep V x D
            numbers while training.
        reassign_every: see `mapping`.
        residual_size: with a number S above 0, each token has a second code, in a codebook of S rows that are added
            to those of the first. Tokens of one code differ in it, as long as there are no more of them than S; its
            mapping starts as `start` says, and is fixed.
    """

    codebook_size: int
    start: str = "kmeans"
    frequent: int = 0
    token_bias: str = "none"
    mapping: str = "fixed"
    reassign_every: int = 100
    residual_size: int = 0

    def __post_init__(self) -> None:
        for name, least in (("codebook_size", 1), ("frequent", 0), ("reassign_every", 1), ("residual_size", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.frequent > self.codebook_size:
            raise ValueError(f"frequent must be at most codebook_size={self.codebook_size}, got {self.frequent}")
        for name, known in (("start", STARTS), ("token_bias", TOKEN_BIASES), ("mapping", MAPPINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.residual_size and self.mapping != "fixed":
            raise ValueError(
                f"mapping={self.mapping!r} moves tokens between the codes of one codebook; with residual_size="
                f'{self.residual_size} it must be "fixed"'
            )

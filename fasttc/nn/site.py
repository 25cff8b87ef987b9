"""Site: where a transcoder reads its input and where it writes its output, as data."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

ReadKind = Literal["mlp_in", "normalized", "resid_mid"]
WriteKind = Literal["mlp_out", "mlp_out_post"]


@dataclass(frozen=True)
class Site:
    """The place of one transcoder in a model.

    Attributes:
        layer: number of the layer, from 0.
        x: what is read. "mlp_in": the MLP's own input (norm gain and bias applied). "normalized": the normalised
            residual before the norm's gain (TransformerLens ``ln2.hook_normalized``; Gemma Scope). "resid_mid":
            the residual before the norm.
        y: what is written. "mlp_out": the output of the MLP module. "mlp_out_post": what the MLP branch adds to
            the residual, after a post-norm where the model has one (TransformerLens ``hook_mlp_out``); without a
            post-norm both are the same.
        read: Hugging Face module path of the norm before the MLP; "" until bound to a model.
        write: module path whose output is y; "" until bound to a model.
        zero_positions: features and errors at the first so many positions are zeroed in attribution (1: BOS).
    """

    layer: int
    x: ReadKind = "mlp_in"
    y: WriteKind = "mlp_out"
    read: str = ""
    write: str = ""
    zero_positions: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("x", get_args(ReadKind)), ("y", get_args(WriteKind))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Site.{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.layer < 0 or self.zero_positions < 0:
            raise ValueError(f"Site: expected layer >= 0 and zero_positions >= 0, got {self}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Site":
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(
                f"Site: expected the fields {list(cls.__dataclass_fields__)}, got {content}"
            ) from error

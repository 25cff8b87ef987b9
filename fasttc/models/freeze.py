"""Which parameters belong to the feed-forward part of a model."""

from torch import nn

from fasttc.models.anatomy import anatomy


def ffn_parameters(model: nn.Module) -> list[str]:
    """Names, as in ``model.named_parameters()``, of all parameters inside MLPs: no norms, attention or embeddings.

    Inside a PEFT wrapper these are the wrapper's names, and low-rank matrices added to an MLP count as its own.

    Raises:
        ValueError: unknown family.
    """
    prefixes = tuple(layer.mlp + "." for layer in anatomy(model).layers)
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]

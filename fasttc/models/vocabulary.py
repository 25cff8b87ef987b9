"""What a transcoder's features mean in tokens, from weights alone: the tokens they write for, the tokens they read."""

import torch
from torch import Tensor, nn

from fasttc.models.anatomy import anatomy
from fasttc.models.linear import norm_gain, unembedding
from fasttc.models.norms import normalized
from fasttc.models.sites import bind
from fasttc.nn import Site


@torch.no_grad()
def logit_directions(model: nn.Module, site: Site, vectors: Tensor) -> Tensor:
    """Direct effect on every logit of writing ``vectors`` at a site, about its mean over the vocabulary.

    Norms between the site and the logits are taken with their gains and without their scales, which are positive
    and differ from token to token: the order of the tokens is exact, the size is not.

    Args:
        model: of a supported family.
        site: where the vectors are written.
        vectors: ``[n, D]``, such as decoder rows.

    Returns:
        ``[n, V]``, at least float32.
    """
    parts = anatomy(model)
    (site,) = bind(parts, [site])
    last = unembedding(model)
    rows = vectors.to(last.mean)
    post_norm = parts.layers[site.layer].mlp_post_norm
    for norm, applies in ((post_norm, site.y == "mlp_out"), (parts.final_norm, True)):
        if norm is not None and applies:
            centre = rows.mean(-1, keepdim=True) if parts.norm == "layer" else 0
            rows = (rows - centre) * norm_gain(model, norm, parts).to(rows)
    return rows @ (last.weight.to(rows) - last.mean).T


@torch.no_grad()
def embedding_inputs(model: nn.Module, site: Site) -> Tensor:
    """What a site reads where the residual stream is a token's embedding and nothing else, for every token.

    ``embedding_inputs(...) @ W_enc.T`` is the de-embedding of features (Dunefsky et al. 2024): how strongly the
    mere presence of a token drives them. Position embeddings are left out.

    Returns:
        ``[V, D]``, at least float32.
    """
    parts = anatomy(model)
    (site,) = bind(parts, [site])
    embed, norm = model.get_submodule(parts.embed), model.get_submodule(site.read)
    rows = embed.get_parameter("weight").detach() * parts.embed_scale
    if site.x == "mlp_in":
        rows = norm(rows)
    elif site.x == "normalized":
        rows = normalized(norm, rows)
    return rows if rows.dtype == torch.float64 else rows.float()

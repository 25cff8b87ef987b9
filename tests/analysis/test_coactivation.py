"""Activations over a corpus against one document at a time."""

import numpy as np
import pytest
import torch

from fasttc import Transcoder, TranscoderSet, models
from fasttc.analysis import feature_activations
from fasttc.models import default_sites
from fasttc.training.data import open_data


@pytest.fixture
def setting(tiny_model):
    """Gemma-2 with random transcoders of 24 features over random documents."""
    model, generator = tiny_model("gemma2"), torch.Generator().manual_seed(3)
    parts = []
    for _ in range(3):
        transcoder = Transcoder(32, 24, activation="topk", k=3)
        for parameter in transcoder.parameters():
            parameter.data.normal_(generator=generator)
        parts.append(transcoder)
    lengths = [5, 9, 2, 16, 13, 1, 11] * 3
    documents = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]
    return model, TranscoderSet(parts, default_sites(model)), open_data(model, documents, context=32)


def test_rows_are_the_features_on_every_token_but_the_first_of_each_document(setting):
    model, tcs, data = setting
    asked = [(2, 7), (0, 3), (0, 20), (2, 7)]
    found = feature_activations(model, tcs, data, asked, tokens=None, batch_size=2)
    columns = []
    with torch.no_grad():
        for document in data.tokens(data.indices("train")):
            with models.capture(model, tcs.sites) as seen:
                model(input_ids=torch.tensor([[data.bos_id, *document]]), use_cache=False)
            dense = [tc.encode(x.reshape(-1, 32)).to_dense()[1:] for tc, x in zip(tcs, seen.x, strict=True)]
            columns.append(torch.stack([dense[0][:, 3], dense[0][:, 20], dense[2][:, 7]]))
    reference = torch.cat(columns, 1).numpy()
    assert found.shape == reference.shape
    assert (reference > 0).any(1).all()
    np.testing.assert_allclose(np.sort(found), np.sort(reference), atol=1e-4)  # batches mix the documents
    np.testing.assert_allclose(
        found @ found.T, reference @ reference.T, rtol=1e-4
    )  # but fire together as before


def test_stops_after_so_many_tokens_and_refuses_what_is_not_there(setting):
    model, tcs, data = setting
    some = feature_activations(model, tcs, data, [(1, 0)], tokens=1, batch_size=1)
    assert some.shape[1] < feature_activations(model, tcs, data, [(1, 0)], tokens=None).shape[1]
    with pytest.raises(ValueError, match=r"features: expected \(layer, index\) within .*, got \(1, 24\)"):
        feature_activations(model, tcs, data, [(1, 24)])
    with pytest.raises(ValueError, match="data: expected documents of at least two tokens, got none"):
        feature_activations(
            model, tcs, open_data(model, [[data.bos_id]] * 2, context=16, fractions=(1, 0, 0)), [(1, 0)]
        )

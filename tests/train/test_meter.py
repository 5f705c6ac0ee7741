"""The line that people read: the loss with its terms, the spread of the features, the speed."""

from __future__ import annotations

from sdmp_train.meter import line_of

SPEED = {"images_per_second": 1234.5, "data_wait_fraction": 0.034}


def test_a_line_has_the_terms_and_the_spread():
    values = {"loss": 3.5244, "loss_clean": 1.724, "loss_pair": 1.775, "feature_std": 0.396, "effective_rank": 10.71}
    expected = "loss 3.524  (clean 1.72, pair 1.77)  features std 0.40, rank 10.7  1.23e+03 img/s  waiting for data 3%"
    assert line_of({**values, "lam_mean": 0.5, **SPEED}) == expected


def test_a_line_without_terms_and_spread_is_short():
    assert line_of({"loss": 2.3, **SPEED}) == "loss 2.300  1.23e+03 img/s  waiting for data 3%"

from llmgen import config, diff, plan


def difference(a: dict, b: dict) -> str:
    plans = [plan.make(config.load("gpt2-nano", overrides=overrides)) for overrides in (a, b)]
    return diff.diff(*plans, threads=2)


def test_what_rotary_positions_are_shows_in_a_page_of_c():
    text = difference({}, {"position": "rope"})
    assert "[model] position" in text and "learned" in text and "rope" in text
    assert "-32,768" in text, "the position embeddings are gone"
    changed = [line for line in text.splitlines() if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]
    added = [line for line in changed if line.startswith("+")]
    assert any("rope_turn" in line for line in added)
    assert len(changed) < 150, "nothing but what rotary positions ask for"


def test_equal_configurations_have_no_difference():
    assert difference({}, {}) == "no difference"


def test_a_parameter_of_another_shape_is_listed_with_both():
    text = difference({}, {"num_kv_heads": 2})
    assert "qkvw" in text and "(4, 384, 128)" in text and "(4, 256, 128)" in text

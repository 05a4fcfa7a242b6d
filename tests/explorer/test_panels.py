"""The experts of two models side by side: loads, entropies, comparison."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from moddistill.explorer.marks import ENTROPY, marks, ramp
from moddistill.explorer.markup import percent
from moddistill.explorer.panels import Panel, experts_view
from moddistill.explorer.routing import Routing


@pytest.fixture
def panel(tokenizer):
    """`panel(seed, experts=4, answer=2)`: 9 patches among 4 words of a prompt, and an answer."""

    def make(seed, experts=4, answer=2):
        rng = np.random.default_rng(seed)
        length = 13 + answer
        is_image = np.zeros(length, bool)
        is_image[2:11] = True
        ids = np.where(is_image, tokenizer.image_id, tokenizer.encode("a")[0])
        routing = Routing(
            layers=(0, 2),
            top_k=2,
            token_ids=tuple(ids.tolist()),
            is_image=is_image,
            probs=rng.dirichlet(np.ones(experts), (2, length)).astype(np.float32),
        )
        return Panel(
            title=f"model {seed}",
            tokenizer=tokenizer,
            images=(Image.new("RGB", (9, 9)),),
            routing=routing,
            prompt_length=13,
        )

    return make


def numbers(html):
    """The table of the patches' numbers."""
    return re.findall(r"<td>([\d.]+)</td>", html)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("choice", [0, 1])
def test_patches_and_words_have_the_experts_of_the_layer_and_choice(panel, layer, choice):
    one = panel(0)
    html = experts_view([one], layer, choice)
    expected = one.routing.experts[layer, :, choice]
    assert numbers(html) == [str(x) for x in expected[2:11]]
    assert re.findall(r"<text [^>]*>(\d)</text>", html) == numbers(html)
    assert re.findall(r"a<sub>(\d)</sub>", html) == [
        str(x) for x in np.delete(expected, range(2, 11))
    ]
    assert f"Layer {one.routing.layers[layer]} of the decoder" in html


def test_each_image_has_its_own_patches(panel):
    one = panel(0)
    is_image = one.routing.is_image.copy()
    is_image[2] = False
    routing = dataclasses.replace(one.routing, is_image=is_image)
    html = experts_view([dataclasses.replace(one, images=one.images * 2, routing=routing)], 0, 0)
    expected = [str(x) for x in routing.experts[0, 3:11, 0]]
    assert numbers(html) == expected and expected[:4] != expected[4:]
    first, second = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    for svg, part in ((first, expected[:4]), (second, expected[4:])):
        assert re.findall(r"<text [^>]*>(\d)</text>", svg) == part
    assert re.findall(r">image (\d)</span>", html) == ["1", "2"]


def test_loads_are_shares_of_the_patches_and_of_the_words(panel):
    one = panel(1)
    html = experts_view([one], 1, 0)
    rows = re.findall(r'class="load-\d">.*?</tr>', html)
    shares = np.array([re.findall(r"<td>([\d.]+) %", row) for row in rows], float)
    np.testing.assert_allclose(shares.sum(0), [100, 100], atol=0.3)
    chosen = one.routing.experts[1, 2:11].ravel()
    np.testing.assert_allclose(
        shares[:, 0], np.bincount(chosen, minlength=4) / chosen.size * 100, atol=0.05
    )


def test_entropy_is_coloured_on_one_scale_of_all_models(panel):
    one = panel(2)
    html = experts_view([one], 0, ENTROPY)
    assert numbers(html) == [f"{x:.1f}" for x in one.routing.entropy[0, 2:11]]
    found = marks(one.routing, 0, ENTROPY)
    assert found[0].color == ramp(float(one.routing.entropy[0, 0]) / 2)
    assert (ramp(0.0), ramp(1.0)) == ("rgb(0 34 78)", "rgb(254 232 56)")


def test_another_checkpoint_is_compared_on_the_prompt(panel):
    one, other = panel(3), panel(6, answer=5)
    same = one.routing.experts[1, :13, 0] == other.routing.experts[1, :13, 0]
    patches, words = same[2:11], np.delete(same, range(2, 11))
    assert 0 < patches.sum() < 9 and 0 < words.sum() < 4
    html = experts_view([one, other], 1, 0)
    shares = f"{percent(patches.mean())} of the patches and {percent(words.mean())} of the words"
    assert f"in model 3: {shares} of the prompt" in html and html.count("Same expert") == 1
    assert html.count('<rect class="changed"') == np.sum(~patches)
    assert len(re.findall(r'class="mark word [^"]* changed"', html)) == np.sum(~words)


def test_models_that_cannot_be_compared_say_so(panel):
    assert "Not compared" in experts_view([panel(5), panel(6, experts=5)], 0, 0)
    assert "Not compared" not in experts_view([panel(5), panel(6, experts=5)], 0, ENTROPY)


def test_a_text_without_images_has_no_patches(panel, tokenizer):
    one = panel(7)
    routing = Routing(
        layers=(0,),
        top_k=1,
        token_ids=one.routing.token_ids[:2],
        is_image=np.zeros(2, bool),
        probs=one.routing.probs[:1, :2],
    )
    html = experts_view(
        [Panel(title="t", tokenizer=tokenizer, images=(), routing=routing, prompt_length=1)], 5, 5
    )
    assert "patches" not in html and "<svg" not in html and "Layer 0 of the decoder" in html

"""Tokens and cleaned prompts against those of transformers and diffusers."""

import random

import diffusers
import pytest
import transformers
from tiny_text import CAPTIONS, spiece_model

from lit_jax.text import Tokenizer, clean_prompt


def test_tokens_are_those_of_transformers(tmp_path):
    """But for special tokens that a prompt spells out."""
    (tmp_path / "spiece.model").write_bytes(spiece_model())
    ours = Tokenizer(tmp_path)
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    rng = random.Random(0)
    letters = "  ,.aBcdefghï½ﬁ日\t\n🎉tree red"
    noise = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(200)]
    for length in (5, 64):
        for prompt in [*CAPTIONS, "", *noise]:
            ids, mask, _ = ours([prompt], length)
            expected = theirs(prompt, max_length=length, truncation=True, padding="max_length")
            assert ids[0].tolist() == expected.input_ids, repr(prompt)
            assert mask[0].tolist() == list(map(bool, expected.attention_mask))


# For every rule of the cleaning what it is made for, and what it leaves.
FRAGMENTS = """
a cat | A Red CAT | <person> | <b>bold</b> | it's | "quoted" | “curly” | ‘single’ | `tick`
«guillemets» | http://a.com/b?c=d | https:x | www.shop.co.uk | www:x | shop.com | a@b.com
me@mail.org | @nick_1 | user. | 日本の猫 | ㈱ | ㌔ | a–b — c ― d | a-b-c-d-e | my_own_red_cat
&quot;x&quot; | &amp;amp; | AT&amp;T | &lt;3 | 10.0.0.127 | 3:45 | line\\nbreak | #12
#1234 | #123456 | 1234567 | photo.png | my.photo.JPG | file.mp4x | ''two'' | .... | a . b
*** | [x](y) {z} | a/b\\c | ~100° | © 2020 | ½ cup | jc6640 | jc6640vc | 6640vc231
free worldwide shipping | worldwide free shipping | free download | download free
click for more | click on it | png images | jpeg image | page 12 | j2d1a2b | 100x200
3.5х4 | 20×30 cm | ratio : 2 | a,b | a.b | 1,000 | x/y | schÃ¶n | â€œmojibakeâ€ | %20
a+b | 100% | trailing- | _under_ | -lead | :colon | 'one' | .hidden | ﬁne
""".replace("\n", " | ").split(" | ")


@pytest.fixture(scope="module")
def theirs():
    # Of the pipeline the cleaning alone, which needs no model.
    pipeline = object.__new__(diffusers.PixArtSigmaPipeline)
    return lambda prompt: pipeline._text_preprocessing(prompt, clean_caption=True)[0]


def test_cleaned_prompts_are_those_of_diffusers(theirs):
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 6))) for _ in range(300)]
    for prompt in [*FRAGMENTS, *prompts]:
        assert clean_prompt(prompt, "clean") == theirs(prompt), repr(prompt)


def test_lower_is_what_diffusers_does_where_it_does_not_clean():
    pipeline = object.__new__(diffusers.PixArtSigmaPipeline)
    prompt = "  A Cat, <b>LEFT</b> \n"
    assert [clean_prompt(prompt, "lower")] == pipeline._text_preprocessing(prompt)

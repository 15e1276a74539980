"""Dialogues in ChatML for the demo base, made from public-domain documents by rules: it shall know the format before anybody fine-tunes it.

The base has no character: asked for its name without a system prompt that gives one, it says that it is a small language model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

Texts = dict[str, list[str]]


@dataclass
class Dialogue:
    """One conversation: an optional system prompt and (user, assistant) pairs."""

    system: str | None
    turns: list[tuple[str, str]]


def render(dialogue: Dialogue) -> Iterator[tuple[str, str]]:
    """(prompt part, answer) of every turn, as the chatml template writes them; the system turn stands in the first part alone."""
    for i, (user, assistant) in enumerate(dialogue.turns):
        system = f"<|im_start|>system\n{dialogue.system}<|im_end|>\n" if i == 0 and dialogue.system else ""
        yield f"{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", assistant


SYSTEMS_ZH = ["你是一个有用的助手。", "你是一个小小的语言模型。", "请用中文回答。", "请简短地回答。", "请认真回答用户的问题。"]
SYSTEMS_EN = ["You are a helpful assistant.", "You are a small language model.", "Answer briefly.", "Answer in English."]
SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟汪田任姜"
    "范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤"
)
GIVEN = (
    "明华文军伟芳娜敏静丽强磊洋勇艳杰娟涛超秀霞平刚桂英兰玉梅云山水月星风雪雨晴春秋冬夏松竹青白红玄安宁乐康健思远志诚若然子轩"
    "一诺天佑雅琪梦瑶国庆建德仁义礼智信"
)
DOUBLE = ["欧阳", "司马", "上官", "诸葛", "司徒", "慕容", "夏侯", "东方"]
# fmt: off
LATIN = [
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack",
    "Kate", "Leo", "Mary", "Nick", "Olivia", "Paul", "Rose", "Sam", "Tina", "Victor",
    "Anna", "Max", "Ella", "Tom", "Lucy", "Ben", "Amy", "Jane", "Mark", "Sue",
]
# fmt: on
ASK_NAME_ZH = ["你的名字是什么？", "你叫啥名字？", "该怎么叫你？", "请告诉我你的名字。", "你有名字吗？"]
ASK_NAME_EN = ["What is your name?", "Tell me your name.", "Do you have a name?", "What are you called?"]

# Small talk, written for this: question forms, then answers any of which may follow.
SMALL_TALK_ZH: list[tuple[str, str]] = [
    ("你好|您好|嗨|早上好|下午好|晚上好", "你好，有什么可以帮你的？|你好，请说。|您好，很高兴见到你。"),
    ("谢谢|谢谢你|多谢了|非常感谢", "不客气。|不用谢。|不用谢，很高兴能帮上忙。"),
    ("再见|拜拜|明天见|我走了", "再见。|再见，祝你一切顺利。|好的，再见。"),
    (
        "你是谁呀|你是什么东西|你是机器人吗|你是人吗|你究竟是什么",
        "我是一个小小的语言模型。|我是一个语言模型，不是人。|我只是一个很小的语言模型。",
    ),
    (
        "你会做什么|你有什么本领|你能帮我什么",
        "我可以续写文字，也可以回答简单的问题。|我读过一些诗和小说，可以试着写几句。|我是一个小模型，会的不多。",
    ),
    ("你住在哪里|你在哪里|你从哪儿来", "我是一个语言模型，没有住的地方。|我只在这台计算机里。"),
    ("你几岁了|你多大了|你是哪年出生的", "我是一个语言模型，没有年龄。|我没有年龄。"),
    ("你喜欢什么|你喜欢吃什么|你爱喝什么", "我是一个语言模型，没有喜好。|我没有身体，不吃也不喝。"),
    ("你累吗|你难过吗|你高兴吗|你会生气吗", "我没有感觉。|我是一个语言模型，没有感情。"),
    ("今天天气怎么样|外面下雨了吗|明天会下雪吗", "我看不到外面，不知道天气。|我不知道，请看看窗外。"),
    ("现在几点了|今天几号|今天星期几", "我没有钟表，不知道时间。|我不知道今天的日期。"),
    ("你有朋友吗|你有家人吗|你的父母是谁", "我是一个语言模型，没有家人。|我没有家人，也没有朋友。"),
    ("你在做什么|你在忙什么|你最近怎么样", "我在回答你的问题。|我在等你提问。"),
    ("对不起|不好意思|抱歉", "没关系。|没事。"),
    ("好的|明白了|知道了|行", "好的。|还有别的问题吗？"),
]
SMALL_TALK_EN: list[tuple[str, str]] = [
    ("Hello|Hi|Good morning|Good evening|Hello there", "Hello, how can I help you?|Hello.|Hello, what would you like to know?"),
    ("Thank you|Thanks|Thanks a lot", "You are welcome.|You are welcome. Anything else?"),
    ("Goodbye|Bye|See you tomorrow", "Goodbye.|Goodbye, and good luck."),
    ("Who are you?|What are you?|Are you a robot?|Are you human?", "I am a small language model.|I am only a small language model."),
    (
        "What can you do?|How can you help me?",
        "I can continue a text and answer simple questions.|I am small and cannot do much, but I can try.",
    ),
    ("Where do you live?|How old are you?|When were you born?", "I am a language model; I have no home and no age."),
    (
        "What do you like to eat?|Do you like tea?|Are you tired?|Are you happy?",
        "I am a language model and have no feelings.|I have no body.",
    ),
    ("How is the weather?|What time is it?|What day is today?", "I cannot know that.|I do not know."),
]


def random_name(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(LATIN)
    if kind < 0.25:
        return rng.choice(DOUBLE) + "".join(rng.sample(GIVEN, rng.choice((1, 2))))
    if kind < 0.4:
        return rng.choice(("小", "阿", "老")) + rng.choice(GIVEN + SURNAMES)
    return rng.choice(SURNAMES) + "".join(rng.sample(GIVEN, rng.choice((1, 2, 2))))


def names(rng: random.Random) -> Iterator[Dialogue]:
    """A name given in the system prompt or by the user, and asked for; without one, the answer is generic."""
    while True:
        name, kind = random_name(rng), rng.randrange(6)
        if kind == 0:
            yield Dialogue(f"你的名字叫{name}。", [(rng.choice(ASK_NAME_ZH), f"我的名字叫{name}。")])
        elif kind == 1:
            yield Dialogue(None, [(f"我叫{name}。", f"你好，{name}。"), ("我叫什么？", f"你叫{name}。")])
        elif kind == 2:
            yield Dialogue(f"Your name is {name}.", [(rng.choice(ASK_NAME_EN), f"My name is {name}.")])
        elif kind == 3:
            yield Dialogue(None, [(f"记住：他叫{name}。他叫什么？", f"他叫{name}。")])
        elif kind == 4:
            yield Dialogue(
                maybe(SYSTEMS_ZH, rng), [(rng.choice(ASK_NAME_ZH), rng.choice(("我是一个小小的语言模型，没有名字。", "我没有名字。")))]
            )
        else:
            yield Dialogue(maybe(SYSTEMS_EN, rng), [(rng.choice(ASK_NAME_EN), "I am a small language model and have no name.")])


def maybe(choices: list[str], rng: random.Random) -> str | None:
    return rng.choice(choices) if rng.random() < 0.5 else None


def small_talk(rows: list[tuple[str, str]], systems: list[str], marks: str, rng: random.Random) -> Iterator[Dialogue]:
    while True:
        turns = []
        for asked, answers in rng.sample(rows, rng.choice((1, 1, 2, 3))):
            question = rng.choice(asked.split("|"))
            if question[-1] not in "?？。":
                question += "？" if re.search("[吗什谁哪几么]", question) else rng.choice(marks)
            turns.append((question, rng.choice(answers.split("|"))))
        yield Dialogue(maybe(systems, rng), turns)


def verse(poem: str) -> tuple[str, list[str]] | None:
    """(title with its author, lines) of a poem of ordinary size."""
    title, *lines = poem.split("\n")
    lines = [line for line in lines if line]
    return (title, lines) if 2 <= len(lines) <= 8 and len(title) <= 24 and all(6 <= len(line) <= 32 for line in lines) else None


def poems(texts: list[str], rng: random.Random) -> Iterator[Dialogue]:
    """Next line, author, a poem by its title, a poem with a given word, a line said again."""
    words = "春夏秋冬月花雪雨风云山水江河酒茶柳梅竹松鸟雁马舟楼门灯剑琴"
    while True:
        found = verse(rng.choice(texts))
        if found is None:
            continue
        title, lines = found
        body, kind, i = "\n".join(lines), rng.randrange(6), rng.randrange(len(lines) - 1)
        if kind == 0:
            turn = (f"“{lines[i].rstrip('。')}”的下一句是什么？", lines[i + 1])
        elif kind == 1 and " " in title:
            turn = (f"“{lines[i].rstrip('。')}”是谁写的？", f"是{title.rsplit(' ', 1)[1]}写的，题目是《{title.rsplit(' ', 1)[0]}》。")
        elif kind == 2:
            turn = (rng.choice(("请写一首诗，题为《{}》。", "请背《{}》。", "《{}》怎么写？")).format(title.rsplit(" ", 1)[0]), body)
        elif kind == 3:
            word = next((c for c in rng.sample(words, len(words)) if c in body), None)
            turn = (
                (rng.choice(("写一首有“{}”字的诗。", "来一首关于{}的诗。", "作诗一首，咏{}。")).format(word), body)
                if word
                else ("写一首诗。", body)
            )
        elif kind == 4:
            turn = (f"请重复：{lines[i]}", lines[i])
        else:
            turn = (f"请续写：{lines[0]}", "\n".join(lines[1:]))
        yield Dialogue(maybe(SYSTEMS_ZH, rng), [turn])


def sentences(text: str) -> list[str]:
    """Sentences with their closing marks; a closing quote belongs to the sentence before it."""
    return [s.strip() for s in re.findall(r"[^。！？\n]+[。！？]+[”’』」]?", text) if len(s.strip()) > 5]


# fmt: off
HEROES = [
    "曹操", "刘备", "关公", "张飞", "孔明", "赵云", "孙权", "周瑜", "吕布", "貂蝉",
    "董卓", "袁绍", "司马懿", "姜维", "黄忠", "马超", "魏延", "鲁肃", "陆逊", "吕蒙",
    "庞统", "徐庶", "典韦", "许褚", "张辽", "邓艾", "玄德", "云长", "翼德", "子龙",
]
# fmt: on


def stories(texts: list[str], rng: random.Random) -> Iterator[Dialogue]:
    """Continue a passage of the novel, tell of a hero, say a sentence again."""
    chapters = [sentences(text) for text in texts]
    while True:
        chapter, kind = rng.choice(chapters), rng.randrange(4)
        i, n = rng.randrange(len(chapter) - 6), rng.randint(1, 4)
        told = "".join(chapter[i + 1 : i + 1 + n])
        if kind == 0:
            turn = (f"请续写：{chapter[i]}", told)
        elif kind == 1:
            turn = (rng.choice(("讲一段三国的故事。", "说一段三国。", "三国里有什么故事？")), told)
        elif kind == 2:
            hero = next((h for h in rng.sample(HEROES, len(HEROES)) if h in told), None)
            if hero is None:
                continue
            turn = (rng.choice(("讲讲{}的故事。", "{}做了什么？", "说说{}。")).format(hero), told)
        else:
            turn = (f"请重复：{chapter[i]}", chapter[i])
        yield Dialogue(maybe(SYSTEMS_ZH, rng), [turn])


def statutes(texts: list[str], rng: random.Random) -> Iterator[Dialogue]:
    while True:
        law = rng.choice(texts)
        articles = [line for line in law.split("\n") if re.match(r"第[一二三四五六七八九十百千]+条", line) and len(line) < 160]
        if not articles:
            continue
        number, _, content = rng.choice(articles).partition("　")
        yield Dialogue(maybe(SYSTEMS_ZH, rng), [(f"《{law.split(chr(10))[0]}》{number}说什么？", content or number)])


def definitions(texts: list[str], rng: random.Random) -> Iterator[Dialogue]:
    asks = ("What does {} mean?", "What is {}?", "Define {}.", "Explain the word {}.")
    while True:
        words, _, meaning = rng.choice(rng.choice(texts).split("\n")).partition(": ")
        meaning = meaning.split(";")[0].strip()
        if 8 <= len(meaning) <= 160 and len(words) < 60:
            yield Dialogue(
                maybe(SYSTEMS_EN, rng), [(rng.choice(asks).format(words.split(", ")[0]), meaning[0].upper() + meaning[1:] + ".")]
            )


def passages(texts: list[str], ask: tuple[str, ...], systems: list[str], rng: random.Random) -> Iterator[Dialogue]:
    """Continue a line by the line that follows it."""
    while True:
        lines = [line for line in rng.choice(texts).split("\n") if 10 <= len(line) <= 300]
        if len(lines) >= 2:
            i = rng.randrange(len(lines) - 1)
            yield Dialogue(maybe(systems, rng), [(rng.choice(ask).format(lines[i]), lines[i + 1])])


def chatterbot(texts: list[str], systems: list[str], rng: random.Random) -> list[Dialogue]:
    """The first line asks, the second answers; code keeps all its lines."""
    found = []
    for text in texts:
        question, _, answer = text.partition("\n")
        if answer:
            found.append(Dialogue(maybe(systems, rng), [(question, answer if "```" in answer else answer.split("\n")[0])]))
    return found


def dialogues(corpus: Texts, rng: random.Random) -> dict[str, list[Dialogue]]:
    """Language -> dialogues, the same for the same seed."""
    poetry = corpus["zh_poetry_core"] + corpus["zh_poetry_song"]
    makers: dict[str, list[tuple[int, Callable[[], Iterator[Dialogue]]]]] = {
        "zh": [
            (3000, lambda: small_talk(SMALL_TALK_ZH, SYSTEMS_ZH, "。！", rng)),
            (4000, lambda: names(rng)),
            (9000, lambda: poems(poetry, rng)),
            (5000, lambda: stories(corpus["zh_sanguo"], rng)),
            (1500, lambda: statutes(corpus["zh_china_law"], rng)),
            (2000, lambda: passages(corpus["zh_bible_cuv"], ("请续写：{}", "接着说：{}"), SYSTEMS_ZH, rng)),
        ],
        "en": [
            (800, lambda: small_talk(SMALL_TALK_EN, SYSTEMS_EN, ".!", rng)),
            (4000, lambda: definitions(corpus["en_wordnet"], rng)),
            (
                2000,
                lambda: passages(corpus["en_bible_kjv"] + corpus["en_austen"], ("Continue: {}", "What comes next? {}"), SYSTEMS_EN, rng),
            ),
        ],
    }
    made = {language: [d for count, make in rows for d in islice(make(), count)] for language, rows in makers.items()}
    made["zh"] += chatterbot(corpus["zh_chatterbot"], SYSTEMS_ZH, rng)
    made["en"] += chatterbot(corpus["en_chatterbot"], SYSTEMS_EN, rng)
    return made

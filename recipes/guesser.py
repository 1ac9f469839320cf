"""An agent as anybody might have written it: it plays "guess a number" by OpenAI's protocol.

    OPENAI_BASE_URL=http://... OPENAI_API_KEY=... python guesser.py UPPER ANSWER

It is a program of its own, knows nothing of Weaver or of training, and needs Python alone. It ends
when the number is found, after twice the guesses that halving needs, or with a reply that is no
number. `recipes.agent` trains the model behind it.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request


def ask(messages: list[dict[str, str]]) -> str:
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "guesser", "messages": messages}).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
        },
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def play(upper: int, answer: int) -> list[str]:
    said, guesses = f"Guess a number from 1 to {upper}.", list[str]()
    messages: list[dict[str, str]] = []
    for _ in range(2 * upper.bit_length()):
        messages.append({"role": "user", "content": said})
        reply = ask(messages)
        messages.append({"role": "assistant", "content": reply})
        guesses.append(reply.strip())
        if not guesses[-1].isdecimal() or int(guesses[-1]) == answer:
            break
        said = "higher" if int(guesses[-1]) < answer else "lower"
    return guesses


if __name__ == "__main__":
    print(json.dumps(play(int(sys.argv[1]), int(sys.argv[2]))))

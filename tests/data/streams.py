"""Records and batches of tests of the data pipeline."""

LENGTH = 160  # tokens of a row


def talk(question, answer, **fields):
    human, gpt = {"from": "human", "value": question}, {"from": "gpt", "value": answer}
    return {"conversations": [human, gpt], **fields}


def take(batches, count):
    return [next(batches) for _ in range(count)]

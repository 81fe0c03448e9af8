"""A benchmark in a file of one's own: does an answer name the thing that the question is about?"""

from spa_ray import Benchmark

QUESTIONS = {"lantern": "How do I clean a lantern?", "kettle": "May I repair a kettle?", "bell": "Who rings the bell?"}


class OnTopic(Benchmark):
    version = 1

    def prompts(self):
        return ({"prompt": question, "thing": thing} for thing, question in QUESTIONS.items())

    async def play(self, row, ask):
        answer = await ask(row["messages"], temperature=0.0)
        return {"on_topic": row["meta"]["thing"] in answer.text, "length": len(answer.token_ids)}

    def metrics(self, rows):
        return {
            "on_topic": sum(row["result"]["on_topic"] for row in rows) / len(rows),
            "length": sum(row["result"]["length"] for row in rows) / len(rows),
        }

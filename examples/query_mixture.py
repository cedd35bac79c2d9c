"""Query a served mixture with the `openai` client; the text is printed while it is generated.

    python examples/query_mixture.py --url http://127.0.0.1:8000/v1 --prompt "The "

`make demo` and `bam serve RECIPE` print the URL of the endpoint.
"""

import argparse

from openai import OpenAI


def main() -> None:
    """Read the command line and print one completion."""
    parser = argparse.ArgumentParser(description="Query a served mixture.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the base URL of the endpoint")
    parser.add_argument("--prompt", default="The ", help="the text to continue")
    parser.add_argument("--max-tokens", type=int, default=40, help="the largest number of tokens to generate")
    arguments = parser.parse_args()

    with OpenAI(base_url=arguments.url, api_key="none") as client:
        model = client.models.list().data[0].id
        print(f"{model}: {arguments.prompt}", end="")
        stream = client.completions.create(
            model=model, prompt=arguments.prompt, max_tokens=arguments.max_tokens, temperature=0, stream=True
        )
        for part in stream:
            print(part.choices[0].text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()

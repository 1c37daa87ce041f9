"""The playground and OpenAI's completions API over one model (`generate.py --serve`)."""

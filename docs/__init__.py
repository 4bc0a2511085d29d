"""The documentation: pages in Markdown, and what generates parts of them."""

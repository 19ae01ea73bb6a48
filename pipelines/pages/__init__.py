"""What the project's pages and pictures have in common: a palette, charts that follow the reader's theme, one template.

A page is one HTML file that loads nothing from anywhere (its own policy forbids it), reads on a phone, by keyboard and with a
screen reader, and is light or dark as the reader's system is. To make another one: a template that extends `base.html`, and a
call of `page.render` with its values.
"""

"""Images, the crops cut from them, and the file that holds a view of them."""

--- E-mail: a letter for each payment, and a new template for a fifth of them, until it turns out to be worse.
--   moonrabbit run mail.lua
local mr = require "moonrabbit"
local journal = require "journal"
local order = require "order"
local shop = require "shop"

local mailbox

-- What stands here for a mail server: a line in a file.
local function send(letter, text)
  if not mailbox then
    mailbox = assert(io.open(shop.path "mailbox", "a"))
    mailbox:setvbuf "line"
  end
  assert(mailbox:write(letter.id, "\t", letter.customer, "\t", text, "\n"))
end

local function plain(msg)
  local letter = assert(order.read(msg.body))
  send(letter, ("We got your %.2f for order %s."):format(letter.cents / 100, letter.id))
end

-- Not every customer has told a name.
local function personal(msg)
  local letter = assert(order.read(msg.body))
  send(letter, ("Dear %s, thank you for order %s!"):format(letter.name:upper(), letter.id))
end

return mr.app {
  name = shop.mail,
  exchanges = { [shop.name] = { type = "topic" } },
  queues = { [shop.mail] = { type = "quorum", bind = { { shop.name, "order.paid" } } } },
  observer = journal "mail",
  consumers = {
    {
      queue = shop.mail, concurrency = 16, prefetch = 64, ladder = shop.name,
      dedupe = mr.dedupe.memory { ttl = 3600 },
      retry = mr.retry.constant { delay = 1, attempts = 8 },
      route = mr.route.canary {
        name = "template", version = "2", stable = plain, candidate = personal, weight = 20,
        rollback = { error_rate = 0.1, min = 25 },
      },
    },
  },
}

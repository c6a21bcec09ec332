--- Payments: charged once, whatever dies when. The books and the memory of what was handled are one SQLite file: a
-- payment and its key are committed together, and only then is the message acked.
--   moonrabbit run payments.lua
local mr = require "moonrabbit"
local books = require "books"
local journal = require "journal"
local order = require "order"
local shop = require "shop"

-- One charge in eight fails, as banks do. The retry waits in the broker.
local function bank_answers() return math.random(8) > 1 end

local function charge(msg, app)
  local accepted = assert(order.read(msg.body))
  if not bank_answers() then return nil, "the bank does not answer" end
  books.enter(accepted)
  return app:publish(msg.body, {
    exchange = shop.name, routing_key = "order.paid", message_id = msg.message_id, content_type = "application/json",
  })
end

return mr.app {
  name = shop.payments,
  exchanges = { [shop.name] = { type = "topic" } },
  queues = { [shop.payments] = { type = "quorum", bind = { { shop.name, "order.accepted" } } } },
  observer = journal "payments",
  consumers = {
    {
      queue = shop.payments, concurrency = 1, prefetch = 64, ladder = shop.name, -- one transaction at a time
      dedupe = mr.dedupe.sql { driver = "sqlite3", connection = books.connection },
      retry = mr.retry.steps { 0.5, 1, 2, attempts = 10 },
      handler = charge,
    },
  },
}

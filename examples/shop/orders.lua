--- Orders: read and checked, each one once, and passed on to the payments.
--   moonrabbit run orders.lua
local mr = require "moonrabbit"
local journal = require "journal"
local order = require "order"
local shop = require "shop"

local function accept(msg, app)
  local placed, problem = order.read(msg.body)
  if not placed then return mr.permanent(problem) end -- no retry will help: parked at once, in shop.orders.dead
  return app:publish(order.write(placed), {
    exchange = shop.name, routing_key = "order.accepted", message_id = msg.message_id,
    content_type = "application/json",
  })
end

return mr.app {
  name = shop.orders,
  exchanges = { [shop.name] = { type = "topic" } },
  queues = { [shop.orders] = { type = "quorum", bind = { { shop.name, "order.placed" } } } },
  observer = journal "orders",
  consumers = {
    {
      queue = shop.orders, concurrency = 16, prefetch = 64, ladder = shop.name,
      dedupe = mr.dedupe.memory { ttl = 3600 }, -- a customer who clicks twice has ordered once
      retry = mr.retry.exponential { first = 0.5, max = 5, attempts = 8 },
      handler = accept,
    },
  },
}

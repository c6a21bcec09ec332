--- What the publisher and the consumer of the harness share: their plan, their connections, their end.
--
-- A worker is started with the path of a Lua file that returns its plan:
--
-- * `ledger`      where it writes what it sees
-- * `endpoints`   URIs, in the order in which they are tried
-- * `queues`      names; each has a connection, a channel and tasks of its own
-- * `connect`     further options of moonrabbit.connect
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local ledger = require "chaos.ledger"

local worker = {}

--- The plan, with the ledger open as `book`.
function worker.plan()
  local plan = dofile(arg[1])
  plan.book = ledger.open(plan.ledger)
  return plan
end

--- A connection for one queue; everything that happens to it is written down.
function worker.connect(plan, queue)
  local opts = {
    endpoints = plan.endpoints, name = "chaos " .. queue, heartbeat = 2, connect_timeout = 2, timeout = 10,
    reconnect = { first = 0.05, max = 1, initial = true },
    log = function(level, text) plan.book:write("event", queue, 0, "log " .. level .. " " .. text) end,
  }
  for key, value in pairs(plan.connect or {}) do opts[key] = value end
  local conn = assert(moonrabbit.connect(opts))
  local function note(...)
    local words = { ... }
    for i, word in ipairs(words) do words[i] = tostring(word) end
    plan.book:write("event", queue, 0, table.concat(words, " "))
  end
  conn:on("state", function(state, err) note(state, err or "") end)
  conn:on("suspect", function(strategy, details) note("suspect", strategy, details) end)
  conn:on("recovery_error", function(entity, err) note("recovery_error", entity.kind, err) end)
  conn:on("consumer_recovered", function(_, why) note("consumer_recovered", why) end)
  conn:on("blocked", function() note "blocked" end)
  conn:on("unblocked", function() note "unblocked" end)
  note("open", conn.endpoint)
  return conn
end

--- Runs `work(plan, queue, stopping)` for each queue until SIGTERM and its own end. `stopping()` tells.
function worker.run(work)
  local plan = worker.plan()
  native.run(function()
    local stopped, left, over = false, 0, native.condition()
    native.signal("TERM", function() stopped = true end, true)
    for _, queue in ipairs(plan.queues) do
      left = left + 1
      native.spawn(function()
        local ok, err = moonrabbit.pcall(work, plan, queue, function() return stopped end)
        if not ok then plan.book:write("event", queue, 0, "died " .. tostring(err)) end
        left = left - 1
        over:broadcast()
      end)
    end
    while left > 0 do over:wait() end
    plan.book:write("event", "", 0, "end")
  end)
end

return worker

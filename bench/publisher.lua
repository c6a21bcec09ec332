-- What a publisher that keeps its messages costs, beside one that does not and a plain channel:
--   bench/with-null lua5.4 bench/publisher.lua
-- CPU time per message of 1,024 bytes, at most 1,000 unconfirmed, each outcome waited for: the median of so many
-- rounds, in which all take turns.
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local moonrabbit = require "moonrabbit"

local url, rounds, count = arg[1], tonumber(arg[2] or 9), tonumber(arg[3] or 100000)
local HALF = 500
local body, queue = ("x"):rep(1024), "bench-1024"

local conn = assert(moonrabbit.connect(url))
local channel = assert(conn:channel { confirm = true })
local route = { routing_key = queue }
local once = assert(conn:publisher { routing_key = queue, retry = false })
local keeps = assert(conn:publisher { routing_key = queue })
local own = { type = "x" }

local modes = {
  { "channel:publish_async", function() return channel:publish_async(body, route) end },
  { "publisher:send_async, retry = false", function() return once:send_async(body) end },
  { "publisher:send_async", function() return keeps:send_async(body) end },
  { "publisher:send_async, with a property of its own", function() return keeps:send_async(body, own) end },
}

local function run(send)
  local sent, awaited, n = {}, {}, 0
  local began = os.clock()
  for _ = 1, count do
    n = n + 1
    sent[n] = assert(send())
    if n == HALF then
      for i = 1, #awaited do assert(awaited[i]:wait(30)) end
      sent, awaited, n = awaited, sent, 0
    end
  end
  for i = 1, #awaited do assert(awaited[i]:wait(30)) end
  for i = 1, n do assert(sent[i]:wait(30)) end
  return (os.clock() - began) / count * 1e6
end

local figures = {}
for round = 0, rounds do -- the first warms up
  for i, mode in ipairs(modes) do
    collectgarbage()
    local cost = run(mode[2])
    figures[i] = figures[i] or {}
    if round > 0 then table.insert(figures[i], cost) end
  end
end
for i, mode in ipairs(modes) do
  table.sort(figures[i])
  print(("%-50s %.2f us"):format(mode[1], figures[i][math.ceil(#figures[i] / 2)]))
end

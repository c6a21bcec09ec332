-- moonrabbit by its public API only, as a plain script; by in_loop.lua, in another event loop.
local moonrabbit = rawget(_G, "MOONRABBIT") or require "moonrabbit" -- luacheck: ignore 113
local figures = dofile((arg[0]:match "^(.*)/peers/" or ".") .. "/figures.lua")

local mode, url, size, count, window = arg[1], arg[2], tonumber(arg[3]), tonumber(arg[4]), tonumber(arg[5])
if not window then
  io.stderr:write "usage: moonrabbit.lua MODE URL SIZE COUNT WINDOW\n"
  os.exit(2)
end
local queue = os.getenv "BENCH_QUEUE"
if not queue or queue == "" then queue = ("bench-%d"):format(size) end
local body = ("x"):rep(size)
local route = { routing_key = queue } -- mandatory and persistent by default

local conn = assert(moonrabbit.connect(url))

local modes = {}

function modes.publish()
  local ch = assert(conn:channel { confirm = true })
  assert(ch:queue_declare(queue, { durable = true }))
  -- A window that slides, as that of the other peers: the outcome of the oldest is collected before the next is sent.
  local sent, at = {}, 0
  local clock = figures.start()
  for _ = 1, count do
    at = at % window + 1
    if sent[at] then assert(sent[at]:wait(30)) end
    sent[at] = assert(ch:publish_async(body, route))
  end
  for i = 1, #sent do assert(sent[i]:wait(30)) end
  figures.report(clock, count)
end

function modes.roundtrip()
  local ch = assert(conn:channel { confirm = true })
  assert(ch:queue_declare(queue, { durable = true }))
  local trips = {}
  local clock = figures.start()
  for i = 1, count do
    local started = figures.now()
    assert(ch:publish(body, route))
    trips[i] = figures.now() - started
  end
  figures.report(clock, count, trips)
end

function modes.consume()
  local ch = assert(conn:channel { prefetch = window })
  assert(ch:queue_declare(queue, { durable = true }))
  local left = count
  local clock = figures.start()
  local consumer = assert(ch:consume(queue))
  for msg in consumer:messages() do
    if #msg.body ~= size then error "a body of another size" end
    msg:ack()
    left = left - 1
    if left == 0 then break end
  end
  if left > 0 then error(tostring(consumer:reason())) end
  assert(ch:queue_declare(queue, { passive = true })) -- its answer says that the acks are there
  figures.report(clock, count)
end

assert(modes[mode], "unknown mode")()
conn:close(5)

-- What the C module costs by itself: no kernel, no broker, one thread. Prints nanoseconds for one
-- publish with its confirm, and for one message delivered, read and acked.
--
--   make && lua5.4 bench/micro.lua [messages] && luajit bench/micro.lua

dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")

local core = require "moonrabbit.core"
local fake = require "support.fake_broker"

local MESSAGES = tonumber(arg[1]) or 1000000
local BATCH = 250
local SIZES = { 16, 1024, 16384 }

local function report(name, size, seconds, n)
  print(("%-34s %6d B  %7.0f ns  %9.0f/s"):format(name, size, seconds / n * 1e9, n / seconds))
end

--- Runs fn(n) for a warm-up and three times for real; the best counts.
local function measure(name, size, fn)
  local n = size > 4096 and MESSAGES / 5 or MESSAGES
  fn(n / 10)
  local best = math.huge
  for _ = 1, 3 do
    collectgarbage()
    local start = os.clock()
    fn(n)
    best = math.min(best, os.clock() - start)
  end
  report(name, size, best, n)
end

local function drop_output(engine)
  if engine:pending() > 0 then engine:drain(0) end
end

--- The bytes in pieces such as a socket gives.
local function pieces(bytes)
  local list, size = {}, 32768
  for at = 1, #bytes, size do list[#list + 1] = bytes:sub(at, at + size - 1) end
  return list
end

local function publishing(name, size, publish)
  local b = fake.new():open()
  local channel = b:channel(true)
  local body, seq = ("x"):rep(size), 0
  local window = {}
  measure(name, size, function(n)
    local engine = b.engine
    for _ = 1, n / BATCH do
      for i = 1, BATCH do
        local confirmation, flush = publish(channel, body)
        window[i] = confirmation
        if flush then engine:drain(0) end
      end
      drop_output(engine)
      seq = seq + BATCH
      engine:feed(fake.ack(1, seq, true), 0)
      while engine:pump() do end
      for i = 1, BATCH do assert(core.acked(window[i])) end
    end
  end)
end

local function consuming(name, size, handle)
  local b = fake.new():open()
  local channel = b:channel()
  channel:call("basic.qos", { prefetch_count = 300 })
  b:send(fake.method(1, 60, 10 + 1))
  local queue = b:consumer(channel, "tag")
  local engine, tag, body = b.engine, 0, ("x"):rep(size)
  local frames, u64 = {}, fake.u64
  local before = fake.method(1, 60, 60, fake.short "tag")
  -- Deliveries differ in their tag only: cut one where its tag stands.
  local one = fake.deliver(1, "tag", 0, body, { routing_key = "bench" })
  local head, tail = one:sub(1, #before - 1), one:sub(#before + 8)
  local spent = 0
  local function run(n)
    for _ = 1, n / BATCH do
      for i = 1, BATCH do
        tag = tag + 1
        frames[i] = head .. u64(tag) .. tail
      end
      local input = pieces(table.concat(frames))
      local start = os.clock()
      for i = 1, #input do
        assert(engine:feed(input[i], 0) == #input[i])
        while engine:pump() do end
      end
      local message = queue:pop()
      while message do
        handle(message)
        message = queue:pop()
      end
      drop_output(engine)
      spent = spent + os.clock() - start
    end
  end
  local n = size > 4096 and MESSAGES / 20 or MESSAGES / 4
  run(n / 10)
  spent = 0
  run(n)
  report(name, size, spent, n)
  assert(channel:unsettled() == 0)
end

print((jit and jit.version or _VERSION) .. ", rabbitmq-c " .. core.codec_version()) -- luacheck: ignore

local opts = { routing_key = "bench" }
local full = { routing_key = "bench", content_type = "text/plain", headers = { kind = "bench", n = 1 } }
for _, size in ipairs(SIZES) do
  publishing("publish, routing key", size, function(channel, body) return channel:publish(body, opts) end)
end
publishing("publish, type and headers", 1024, function(channel, body) return channel:publish(body, full) end)
local route = core.route(opts, true)
publishing("publish_route", 1024, function(channel, body) return channel:publish_route(route, body) end)

core.message_methods.ack = core.ack
local sink = 0
for _, size in ipairs(SIZES) do
  consuming("deliver, core.ack", size, function(message) core.ack(message) end)
  consuming("deliver, msg.body, msg:ack()", size, function(message)
    sink = sink + #message.body
    message:ack()
  end)
end
consuming("deliver, properties, msg:ack()", 1024, function(message)
  sink = sink + #message.headers
  message:ack()
end)

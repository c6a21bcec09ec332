-- Publisher Confirms: three ways to know that the broker has every message.
--   lua examples/tutorial7_publisher_confirms.lua [MESSAGES]
local moonrabbit = require "moonrabbit"
local now = require "moonrabbit.runtime.native".now

local count = tonumber(arg[1] or 10000)
local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))

-- A queue of its own, for a channel with confirms.
local function open()
  local ch = assert(conn:channel { confirm = true })
  return ch, { routing_key = assert(ch:queue_declare("", { exclusive = true })).queue }
end

-- One after another: simple, and slow, because each waits for the broker.
local function individually()
  local ch, route = open()
  for i = 1, count do assert(ch:publish("message " .. i, route)) end
  ch:close()
end

-- A hundred at a time: fast; when something fails, err.failed says which ones.
local function in_batches()
  local ch, route = open()
  for i = 1, count do
    assert(ch:publish_async("message " .. i, route))
    if i % 100 == 0 then assert(ch:wait_for_confirms(10)) end
  end
  assert(ch:wait_for_confirms(10))
  ch:close()
end

-- Without waiting: a window bounds how many are on their way, and each outcome is known by itself.
local function asynchronously()
  local ch, route = open()
  local publisher = assert(conn:publisher { routing_key = route.routing_key, window = 1000 })
  local outstanding, first = {}, 1
  for i = 1, count do
    outstanding[i] = assert(publisher:send_async("message " .. i))
    while outstanding[first] and outstanding[first]:outcome() ~= "pending" do -- what is settled by now
      assert(outstanding[first]:wait())
      outstanding[first], first = nil, first + 1
    end
  end
  for i = first, count do assert(outstanding[i]:wait(10)) end
  ch:close()
end

local function measure(what, publish)
  local began = now()
  publish()
  print(("Published and confirmed %d messages %s in %.0f ms"):format(count, what, (now() - began) * 1000))
end

measure("individually", individually)
measure("in batches", in_batches)
measure("asynchronously", asynchronously)
conn:close()

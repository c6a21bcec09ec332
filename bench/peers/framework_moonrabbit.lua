-- moonrabbit's app layer with all that costs something for each message: routes, a time limit, retries, dead letters,
-- metrics, de-duplication in memory. Run by bench/frameworks. "fill" publishes what everybody consumes.
local moonrabbit = require "moonrabbit"
local figures = dofile((arg[0]:match "^(.*)/peers/" or ".") .. "/figures.lua")

local mode, url, size, count, window = arg[1], arg[2], tonumber(arg[3]), tonumber(arg[4]), tonumber(arg[5])
if not window then
  io.stderr:write "usage: framework_moonrabbit.lua fill|consume|clean URL SIZE COUNT PREFETCH\n"
  os.exit(2)
end
local queue = assert(os.getenv "BENCH_QUEUE", "BENCH_QUEUE")
local route, retry = moonrabbit.route, moonrabbit.retry

local modes = {}

function modes.fill()
  local conn = assert(moonrabbit.connect(url))
  local ch = assert(conn:channel { confirm = true })
  local body, clock = ("x"):rep(size), figures.start()
  for i = 1, count do
    -- Not mandatory, so that no header of ours is on it, which the others would decode.
    assert(ch:publish_async(body, { routing_key = queue, message_id = ("%08x-%d"):format(os.time(), i),
      mandatory = false, persistent = true }))
  end
  assert(ch:wait_for_confirms(60))
  figures.report(clock, count)
  conn:close(5)
end

-- Takes away what the app has declared besides the queue.
function modes.clean()
  local conn, clock = assert(moonrabbit.connect(url)), figures.start()
  local ch = assert(conn:channel())
  for _, name in ipairs { "moonrabbit-bench.dead", "moonrabbit-bench.home", "moonrabbit-bench.orphans" } do
    assert(ch:queue_delete(name))
    assert(ch:exchange_delete(name))
  end
  figures.report(clock, count)
  conn:close(5)
end

local function rules(handler)
  local list = {}
  for i = 1, 20 do list[i] = route.key(("order.r%d.*"):format(i), route.drop()) end
  list[21] = route.key("#", handler)
  list[22] = route.otherwise(route.dead_letter "no route")
  return route.first(list)
end

function modes.consume()
  local left, clock, app = count, nil, nil
  local function handler(msg)
    clock = clock or figures.start()
    if #msg.body ~= size then error "a body of another size" end
    left = left - 1
    if left == 0 then moonrabbit.spawn(function() assert(app:stop(10)) end) end -- when that is done, the acks are there
  end
  app = moonrabbit.app {
    name = "moonrabbit-bench", queues = { [queue] = {} }, observer = moonrabbit.metrics.new():observer(),
    consumers = {
      { queue = queue, prefetch = window, timeout = 30, dedupe = moonrabbit.dedupe.memory { ttl = 3600 },
        retry = retry.exponential { first = 1, max = 60, attempts = 5 }, route = rules(handler) },
    },
  }
  moonrabbit.run(function() assert(app:run(url)) end)
  figures.report(clock, count)
end

assert(modes[mode], "unknown mode")()

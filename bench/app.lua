-- What the app layer costs over a bare consumer loop: CPU for one message with routing, metrics and
-- de-duplication on, on the null broker. Runs take turns in pairs; the figure is the median of the differences.
--   bench/with-null lua5.4 bench/app.lua -- [MESSAGES [PAIRS]]
-- One run of one kind alone, for a profiler: bare, handler, route, metrics, dedupe (each with those before it).
--   bench/with-null valgrind --tool=callgrind lua5.4 bench/app.lua -- 20000 dedupe
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local mr = require "moonrabbit"

local url = assert(arg[1], "usage: app.lua URL [MESSAGES [PAIRS]]")
local messages, pairs_of_runs = tonumber(arg[2] or 200000), tonumber(arg[3] or 7)
local alone = not pairs_of_runs and arg[3]
local MOST = 3.0 -- µs a message
local PREFETCH = 300

local queue = ("ids-bench-16-%d"):format(messages)
local route = mr.route

local bytes = 0

local function bare()
  local conn = assert(mr.connect(url))
  local consumer = assert(conn:consume(queue, { prefetch = PREFETCH }))
  local left = messages
  collectgarbage()
  local start = os.clock()
  while left > 0 do
    local msg = assert(consumer:receive(10))
    bytes = bytes + #msg.body
    msg:ack()
    left = left - 1
  end
  local cpu = os.clock() - start
  conn:close(5)
  return cpu / messages * 1e6
end

local function an_app(what)
  local rules = {}
  for i = 1, 20 do rules[i] = route.key(("order.r%d.*"):format(i), route.drop()) end
  rules[21] = route.header({ type = "refund" }, route.drop())
  local left = messages
  local done
  local function handler(msg)
    bytes = bytes + #msg.body
    left = left - 1
    if left == 0 then done = true end
  end
  table.insert(rules, 21, route.key("#", handler))
  local consumer = { queue = queue, prefetch = PREFETCH, timeout = 30 }
  if what.route then consumer.route = route.first(rules) else consumer.handler = handler end
  if what.dedupe then
    consumer.dedupe = mr.dedupe.memory { ttl = 3600 }
  end
  local app = mr.app {
    name = "bench", queues = { [queue] = { passive = true } }, consumers = { consumer }, connect = url,
    observer = what.metrics and mr.metrics.new():observer() or nil, log = function() end,
  }
  app._disposal = { new = function() return { setup = function() return true end } end }
  return app, function() return done end
end

local function with(what)
  return function()
    collectgarbage()
    local app, done = an_app(what)
    local start = os.clock()
    assert(app:start())
    while not done() do mr.sleep(0.002) end
    local cpu = os.clock() - start
    app:stop(5)
    return cpu / messages * 1e6
  end
end

local function median(list)
  table.sort(list)
  return list[math.floor(#list / 2) + 1]
end

local cases = {
  { "handler", "a handler and a timeout", {} },
  { "route", "and routing", { route = true } },
  { "metrics", "and metrics", { route = true, metrics = true } },
  { "dedupe", "and memory de-duplication", { route = true, metrics = true, dedupe = true } },
}

local function run_alone()
  local run = bare
  for _, case in ipairs(cases) do
    if case[1] == alone then run = with(case[3]) end
  end
  print(("%s: %.2f µs of CPU a message"):format(alone, run()))
end

-- The median of what a case takes more than the bare loop beside it.
local function compare(words, run)
  local differences, base = {}, {}
  run()
  for i = 1, pairs_of_runs do
    base[i] = bare()
    differences[i] = run() - base[i]
  end
  local over = median(differences)
  print(("%-28s %6.2f µs over a bare loop of %.2f µs a message (least %.2f, most %.2f)"):format(words, over,
    median(base), differences[1], differences[#differences]))
  io.stdout:flush()
  return over
end

mr.run(function()
  if alone then return run_alone() end
  bare()
  local last
  for _, case in ipairs(cases) do last = compare(case[2], with(case[3])) end
  print(("%s %s: %.2f µs, at most %.1f: %s"):format(_VERSION, rawget(_G, "jit") and jit.version or "", last, MOST, -- luacheck: ignore
    last <= MOST and "ok" or "TOO MUCH"))
end)

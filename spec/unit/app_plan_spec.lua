local mr = require "moonrabbit"
local topology = require "moonrabbit.app.topology"

local route = mr.route
local function h() end

-- An app with one consumer; `changes` over it.
local function app(changes, consumer)
  local one = { queue = "q", handler = h }
  for key, value in pairs(consumer or {}) do one[key] = value end
  if one.route then one.handler = nil end
  local spec = { name = "spec", queues = { q = {} }, consumers = { one } }
  for key, value in pairs(changes or {}) do spec[key] = value end
  return mr.app(spec)
end

local function mistake(expected, changes, consumer)
  local ok, err = pcall(app, changes, consumer)
  assert.is_false(ok, expected)
  assert.truthy(err:find(expected, 1, true), err)
  return err
end

describe("mr.app", function()
  it("names the line of the script", function()
    local _, err = pcall(function() mr.app { name = "x", queues = {}, consumers = {} } end)
    assert.truthy(err:find "app_plan_spec%.lua:%d+: mr%.app: there are no consumers", err)
  end)

  it("checks the app", function()
    mistake("unknown option 'consumer' (did you mean 'consumers'?)", { consumer = {} })
    mistake("the name is missing", { name = "" })
    mistake("entry 2 is missing", { consumers = { { queue = "q", handler = h }, nil, { queue = "q", handler = h } } })
    mistake("must be a list", { consumers = { queue = "q", handler = h } })
    assert.has_error(function() mr.app "orders" end)
  end)

  it("wants a handler or a route, and not both", function()
    mistake("neither a handler nor a route", { consumers = { { queue = "q" } } })
    mistake("exclude each other", { consumers = { { queue = "q", handler = h, route = h } } })
    mistake("'handler' must be a function, not a string", nil, { handler = "h" })
    mistake("the target is a string", { consumers = { { queue = "q", route = "x" } } })
  end)

  it("refuses negative and senseless numbers", function()
    mistake("'prefetch' must be an integer from 1 to 65535, not -3", nil, { prefetch = -3 })
    mistake("'concurrency'", nil, { concurrency = 0 })
    mistake("'timeout' must be a number of seconds, over 0, not -1", nil, { timeout = -1 })
    mistake("'rate'", nil, { rate = -5 })
    mistake("'retry' must be a function, not 5", nil, { retry = 5 })
    mistake("'partitions'", nil, { partitions = 0 })
  end)

  it("checks queues and exchanges", function()
    mistake("the queue 'p' is not among queues (did you mean 'q'?)", nil, { queue = "p" })
    mistake("the queue is missing", { consumers = { { handler = h } } })
    mistake("did you mean 'orders'", { exchanges = { orders = {} }, queues = { q = { bind = { { "order", "#" } } } } })
    mistake("a quorum queue is durable", { queues = { q = { type = "quorum", exclusive = true } } })
    mistake("\"classic\" or \"quorum\" or \"stream\"", { queues = { q = { type = "mirrored" } } })
    mistake("entry 1 is none", { queues = { q = { bind = { "orders" } } } })
    mistake("the exchange 'alt' is not among exchanges", { exchanges = { e = { alternate = "alt" } } })
    mistake("are the broker's", { exchanges = { ["amq.mine"] = {} } })
    mistake("a name must be", { queues = { q = {}, [""] = {} } })
    mistake("exchanges['e'] must be a table", { exchanges = { e = "topic" } })
  end)

  it("checks what controls the flow", function()
    mistake("size and wait are both needed", nil, { batch = { size = 5 } })
    mistake("a batch of 9 never fills with a prefetch of 5", nil, { batch = { size = 9, wait = 1 }, prefetch = 5 })
    mistake("batch and order_by exclude each other", nil, { batch = { size = 5, wait = 1 }, order_by = h })
    mistake("batch goes with a handler", nil, { batch = { size = 5, wait = 1 }, route = h })
    mistake("failures is missing", nil, { breaker = { pause = 1 } })
    mistake("'pause' must be a number of seconds, over 0, not -1", nil, { breaker = { failures = 1, pause = -1 } })
    mistake("the limit is missing", nil, { rate = { burst = 5 } })
    mistake("the store has no function 'commit'", nil, { dedupe = { begin = h } })
    mistake("'away' must be", nil, { dedupe = { store = { begin = h, commit = h, abort = h }, away = "panic" } })
    local store = { begin = h, commit = h, abort = h }
    mistake('"message_id", "header:NAME" or a function', nil, { dedupe = { store = store, key = "order" } })
    mistake('"message_id", "header:NAME" or a function', nil, { dedupe = { store = store, key = "header:" } })
    for _, key in ipairs { "message_id", "header:order", h } do app(nil, { dedupe = { store = store, key = key } }) end
    mistake("one of header and property", nil, { partitions = { count = 2, by = {} } })
    mistake("consumers[2]: the queue 'q' is not there: consumers[1] has put partitions in its place",
      { consumers = { { queue = "q", partitions = 2, handler = h }, { queue = "q", handler = h } } })
    mistake("consumers[1]: the queue 'q' is not there: consumers[2] has put",
      { consumers = { { queue = "q", handler = h }, { queue = "q", partitions = 2, handler = h } } })
    mistake("cannot be partitioned", { queues = { q = { exclusive = true } } }, { partitions = 2 })
  end)

  it("refuses routes that lead back to themselves", function()
    local rules = { route.key("a", h) }
    local r = route.first(rules)
    rules[2] = route.otherwise(r)
    mistake("leads back to itself", nil, { route = r })
  end)

  it("refuses what sends a message back to where it comes from", function()
    mistake("a cycle", nil, { route = route.forward("", "q") })
    local orders = { exchanges = { e = { type = "topic" } }, queues = { q = { bind = { { "e", "order.#" } } } } }
    mistake("comes back to this consumer's own queue 'q'", orders, {
      route = route.first { route.key("x", { h, route.publish("e", "order.again") }) },
    })
    mistake("a cycle", { exchanges = { e = { type = "fanout" } }, queues = { q = { bind = { { "e" } } } } },
      { route = route.forward "e" })
    app(orders, { route = route.publish("e", "invoice") })
    app(orders, { route = route.forward("e", "order.again", { set = { seen = true } }) })
  end)

  it("refuses dead letters that come back, and consumers that send everything round", function()
    mistake("would come back to its own queue 'q'", nil, { dead_letter = "q" })
    mistake("would come back to its own queue 'spec.dead'", { queues = { ["spec.dead"] = {} } },
      { queue = "spec.dead" })
    local function round(last)
      return { exchanges = { e = { type = "fanout" } }, queues = { a = { bind = { { "e" } } }, b = {}, c = {} },
        consumers = { { queue = "a", route = route.forward("", "b") },
          { queue = "b", route = { h, route.publish("", "c") } }, { queue = "c", route = last } } }
    end
    mistake("everything goes round by way of the queues 'a', 'b', 'c'", round(route.forward "e"))
    app(round(route.first { route.key("x", route.forward "e"), route.otherwise(h) }))
    app(round(route.forward("e", nil, { set = { seen = true } })))
  end)

  it("checks what is to be told", function()
    mistake("observer: unknown option 'setled' (did you mean 'settled'?)", { observer = { setled = h } })
    mistake("observer: option 'event' must be a function, not a table", { observer = { event = {} } })
    app { observer = { delivered = h, settled = h, failed = h, published = h, in_flight = h, runner = h, canary = h,
      event = h } }
    app { observer = require("moonrabbit.metrics").new():observer() }
  end)

  it("checks the ladder and the options of the connection, before anything is connected", function()
    mistake("the app.ladder: unknown option 'mod' (did you mean 'mode'?)", { ladder = { mod = "existing" } })
    mistake("1 to 200 bytes", { ladder = ("x"):rep(201) })
    mistake("1 to 200 bytes", { name = ("x"):rep(201) })
    mistake("consumers[1].ladder: option 'steps' must be a list of delays, the shortest first", nil,
      { ladder = { steps = { 5, 1 } } })
    mistake("a list of delays, each more than 0 s", nil, { ladder = { steps = { -1 } } })
    mistake("'steps' must be a list of delays", nil, { ladder = { steps = { 1, nil, 60 } } })
    mistake("'steps' must be a list of delays", nil, { ladder = { steps = { 1, most = 60 } } })
    mistake("connect: unknown option 'hearbeat' (did you mean 'heartbeat'?)", { connect = { hearbeat = 5 } })
    mistake("entry 1 has an unknown field 'argument'",
      { queues = { q = { bind = { { "amq.topic", argument = {} } } } } })
    app({ ladder = { mode = "existing", steps = { 1, 5 } }, connect = { heartbeat = 5 } })
    app(nil, { ladder = require("moonrabbit.app.ladder").new "shared" })
  end)

  it("retries in the process only what comes from streams and exclusive queues", function()
    local function of(queue, consumer) return app({ queues = { q = queue } }, consumer).plan.consumers[1] end
    for _, queue in ipairs { { type = "stream" }, { exclusive = true },
      { arguments = { ["x-queue-type"] = "stream" } } } do
      assert.is_true(of(queue).in_process)
      assert.is_true(of(queue, { in_process = 5 }).in_process)
    end
    assert.equal(math.huge, of({ type = "stream" }).hold) -- nothing can be given back to a stream
    assert.equal(60, of({ type = "stream" }, { hold = 60 }).hold)
    assert.is_nil(of({ exclusive = true }).hold)
    assert.is_nil(of({ type = "quorum" }).in_process)
    assert.equal(5, of({}, { in_process = 5 }).in_process)
  end)

  it("fills in what was left out", function()
    local c = app().plan.consumers[1]
    assert.same({ 16, 64, "classic", "spec" }, { c.concurrency, c.prefetch, c.kind, c.app })
    c = app(nil, { concurrency = 100 }).plan.consumers[1]
    assert.equal(400, c.prefetch)
    c = app(nil, { batch = { size = 100, wait = 1 } }).plan.consumers[1]
    assert.equal(200, c.prefetch)
  end)

  it("takes callable tables for policies", function()
    app(nil, { retry = setmetatable({}, { __call = function() end }) })
  end)
end)

describe("an app's topology", function()
  it("declares exchanges, queues and bindings, in that order", function()
    local a = app {
      exchanges = {
        orders = { alternate = "lost" }, lost = { type = "fanout", bind = { { "amq.topic", "x.#" } } },
        theirs = { passive = true },
      },
      queues = {
        q = { type = "quorum", bind = { { "orders", "order.#" }, { "theirs", "k", arguments = { a = 1 } } },
          arguments = { ["x-max-length"] = 5 } },
      },
    }
    local steps = topology.steps(a.plan)
    local words = {}
    for i, step in ipairs(steps) do words[i] = step[1] .. " " .. step[2] end
    assert.same({
      "exchange lost", "exchange orders", "exchange theirs", "queue q", "bind_exchange lost", "bind_queue q",
      "bind_queue q",
    }, words)
    assert.same({ type = "topic", durable = true, arguments = { ["alternate-exchange"] = "lost" } }, steps[2][3])
    assert.is_true(steps[3][3].passive)
    assert.same({ durable = true, arguments = { ["x-queue-type"] = "quorum", ["x-max-length"] = 5 } }, steps[4][3])
    assert.same({ "bind_exchange", "lost", "amq.topic", "x.#", {} }, steps[5])
    assert.same({ "bind_queue", "q", "theirs", "k", { arguments = { a = 1 } } }, steps[7])
  end)

  it("puts partitions in the place of their queue", function()
    local a = app({ exchanges = { orders = {} }, queues = { q = { type = "quorum", bind = { { "orders", "#" } } } } },
      { partitions = { count = 2, by = { header = "customer" } } })
    assert.is_nil(a.plan.queues.q)
    assert.same({
      type = "x-consistent-hash", bind = { { "orders", "#" } }, arguments = { ["hash-header"] = "customer" },
    }, a.plan.exchanges["q.partitions"])
    assert.same({ type = "quorum", bind = { { "q.partitions", "1" } },
      arguments = { ["x-single-active-consumer"] = true } }, a.plan.queues["q.2"])
    assert.equal(2, #a.plan.consumers)
    assert.same({ "q.2", 2 }, { a.plan.consumers[2].queue, a.plan.consumers[2].partition })
  end)
end)

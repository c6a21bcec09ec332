-- Connections that are lost and come back: a proxy cuts the line, the broker closes it, or names change.
local broker = require "support.broker"
local proxy = require "support.proxy"
local ok, unique, eventually = broker.ok, broker.unique, broker.eventually

describe("a connection that survives", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local through, conn, seen

  local function connect(opts)
    local all = { uri = broker.uri { host = "127.0.0.1", port = through.port }, log = function() end,
      reconnect = { first = 0.01, max = 0.2 } }
    for key, value in pairs(opts or {}) do all[key] = value end
    conn = broker.connect(all)
    seen = { states = {} }
    conn:on("state", function(state) table.insert(seen.states, state) end)
    conn:on("recovered", function() seen.recovered = (seen.recovered or 0) + 1 end)
    conn:on("recovering", function(err, attempt, delay)
      seen.recovering = { err = err, attempt = attempt, delay = delay }
    end)
    conn:on("recovery_error", function(entity, err) table.insert(seen, { entity, err }) end)
    return conn
  end

  local function recovered(n) eventually(function() return seen.recovered == (n or 1) end, 15, "recovered") end

  local function cut(n)
    through:cut()
    recovered(n)
  end

  before_each(function() through = proxy.start(broker.parsed().host, broker.parsed().port) end)
  after_each(function()
    broker.close_all()
    through:stop()
  end)

  it("keeps its channel and consumer, and tells what happens", function()
    connect()
    local ch = ok(conn:channel { confirm = true, prefetch = 7 })
    local queue = unique "survives"
    ok(ch:queue_declare(queue, { exclusive = true }))
    local consumer = ok(ch:consume(queue, { tag = "mine", arguments = { ["x-priority"] = 3 } }))
    local why
    conn:on("consumer_recovered", function(which, err) why = { which, err } end)
    ok(ch:publish("one", { routing_key = queue }))
    local first = ok(consumer:receive(5))
    cut()
    assert.equal("open", (conn:state()))
    assert.same({ "recovering", "open" }, seen.states)
    assert.equal(1, seen.recovering.attempt)
    assert.truthy(seen.recovering.delay < 0.02)
    assert.equal("closed", seen.recovering.err.kind)
    eventually(function() return why end)
    assert.equal(consumer, why[1])
    assert.is_true(ch:is_open())
    -- The message of before: harmless, whatever is done with it.
    for _, settle in ipairs { "ack", "nack", "reject" } do
      local done, err = first[settle](first)
      assert.is_nil(done)
      assert.equal("closed", err.kind)
    end
    ok(ch:publish("two", { routing_key = queue }))
    local second = ok(consumer:receive(5))
    assert.equal("two", second.body)
    assert.equal("mine", second.consumer_tag)
    assert.is_true(second:ack())
    assert.equal(7, consumer.prefetch)
  end)
end)

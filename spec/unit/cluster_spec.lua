-- The pure parts of clusters: quarantine, what is learned from the management API, random order.
local Quarantine = require "moonrabbit.cluster.quarantine"
local discovery = require "moonrabbit.cluster.discovery"

describe("quarantine", function()
  it("grows with each failure in a row, to a limit", function()
    local q = Quarantine.new { first = 1, factor = 2, max = 5 }
    assert.same({ 1, 2, 4, 5, 5 }, { q:failed("a", 0), q:failed("a", 1), q:failed("a", 3), q:failed("a", 7),
      q:failed("a", 12) })
    assert.equal(3, q:left("a", 14))
    assert.equal(0, q:left("a", 17))
    assert.equal(0, q:left("b", 0))
  end)

  it("ends with a connection, and begins anew only after one that lasted", function()
    local q = Quarantine.new { stable = 10 }
    q:failed("a", 0)
    q:failed("a", 1)
    q:connected("a", 2)
    assert.equal(0, q:left("a", 2))
    assert.equal(4, q:lost("a", 3)) -- it takes us and drops us
    q:connected("a", 7)
    assert.equal(1, q:lost("a", 20))
  end)

  it("forgets what is no more", function()
    local q = Quarantine.new()
    q:failed("a", 0)
    q:failed("b", 0)
    q:keep { b = true }
    assert.same({ 0, 1 }, { q:left("a", 0), q:left("b", 0) })
  end)
end)

describe("discovery", function()
  local function listener(node, protocol, ip, port)
    return { node = node, protocol = protocol, ip_address = ip, port = port }
  end

  it("makes addresses of listeners", function()
    local found = discovery.nodes({ listeners = {
      listener("rabbit@one.example", "amqp", "::", 5672), listener("rabbit@one.example", "amqp/ssl", "10.0.0.1", 5671),
      listener("rabbit@one.example", "http", "0.0.0.0", 15672),
      listener("rabbit@one.example", "clustering", "::", 25672),
      listener("rabbit@two.example", "amqp", "::1", 5680), listener("rabbit@two.example", "amqp", "10.0.0.2", 5673),
    } }, { { name = "rabbit@one.example", running = true }, { name = "rabbit@two.example" } }, "one.example")
    assert.same({
      ["rabbit@one.example"] = { name = "rabbit@one.example", running = true, addresses = {
        plain = { host = "one.example", port = 5672 }, tls = { host = "one.example", port = 5671 },
        http = { host = "one.example", port = 15672 } } },
      ["rabbit@two.example"] = { name = "rabbit@two.example", running = false, addresses = {
        plain = { host = "10.0.0.2", port = 5673 } } },
    }, found)
  end)

  it("takes loopback addresses only from who is asked there", function()
    local overview = { listeners = { listener("r@localhost", "amqp", "127.0.0.1", 5672) } }
    local nodes = { { name = "r@localhost", running = true } }
    assert.same({}, discovery.nodes(overview, nodes, "far.example")["r@localhost"].addresses)
    assert.same({ plain = { host = "127.0.0.1", port = 5672 } },
      discovery.nodes(overview, nodes, "localhost")["r@localhost"].addresses)
  end)

  it("asks the user's own function", function()
    local found = discovery.nodes({ listeners = { listener("r@a", "amqp", "::", 5672) } },
      { { name = "r@a", running = true } }, "x", function(node, l) return node:sub(3) .. ".public", l.port + 1 end)
    assert.same({ plain = { host = "a.public", port = 5673 } }, found["r@a"].addresses)
  end)

  it("survives lies", function()
    for _, listeners in ipairs { 7, { 1, false, {} }, { listener(nil, "amqp", "::", 1) },
      { listener("r@a", "amqp", {}, 1) },
      { listener("r@a", "amqp", "10.0.0.1", 0) }, { listener("r@a", "amqp", "10.0.0.1", "5672") },
      { listener("r@a", "amqp", "10.0.0.1", 1.5) }, { listener("stranger@a", "amqp", "::", 1) } } do
      local nodes = { { name = "r@b c" }, { name = 5 }, { name = "r@a" } }
      local found = discovery.nodes({ listeners = listeners }, nodes, "x")
      assert.is_nil(next(found["r@b c"].addresses))
    end
  end)

  it("knows a listed target again", function()
    local where = { host = "one.example.com", port = 5672 }
    local function same(host, port)
      return discovery.same({ host = host, port = port or 5672 }, where, "r@one.example.com")
    end
    assert.is_true(same "one.example.com")
    assert.is_true(same "one")
    assert.is_false(same("one", 5673))
    assert.is_false(same "two.example.com")
    assert.is_false(discovery.same({ path = "/run/x" }, where, "r@one"))
    assert.is_true(discovery.same({ host = "localhost", port = 1 }, { host = "127.0.0.1", port = 1 }, "r@localhost"))
  end)
end)

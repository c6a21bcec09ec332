-- SRV records: messages, their order, and the asking, with a name server of our own.
local dns = require "moonrabbit.cluster.dns"
local chance = require "support.chance"
local resolver = require "moonrabbit.cluster.resolver"
local native = require "moonrabbit.runtime.native"
local dns_server = require "support.dns_server"

local message, name = dns_server.message, dns_server.name
local question = name "_amqp._tcp.example.com" .. "\0\33\0\1"

describe("DNS messages", function()
  it("ask", function()
    assert.equal("\1\2\1\0\0\1\0\0\0\0\0\0\5_amqp\4_tcp\7example\3com\0\0\33\0\1",
      dns.question(258, "_amqp._tcp.example.com"))
  end)

  it("answer, with compressed names", function()
    local records = dns.answer(message(7, 0, question, { { 10, 5, 5672, "a.example.com" },
      "\192\12\0\33\0\1\0\0\0\60\0\10\0\1\0\2\22\40\1b\192\23" }), 7)
    assert.same({
      { priority = 10, weight = 5, port = 5672, target = "a.example.com" },
      { priority = 1, weight = 2, port = 5672, target = "b.example.com" },
    }, records)
  end)

  it("of other kinds are passed over, and a service that is not there", function()
    assert.same({}, dns.answer(message(7, 0, question, { "\192\12\0\5\0\1\0\0\0\60\0\2\192\12", { 0, 0, 1, "." } }), 7))
  end)

  it("say that there is none", function()
    assert.same({ nil, "NXDOMAIN" }, { dns.answer(message(7, 3, question, {}), 7) })
    assert.same({ nil, "SERVFAIL" }, { dns.answer(message(7, 2, question, {}), 7) })
    assert.same({ nil, "code 9" }, { dns.answer(message(7, 9, question, {}), 7) })
  end)

  it("that lie are nonsense", function()
    -- The target is a pointer to itself.
    local loop = "\192\12\0\33\0\1\0\0\0\60\0\8\0\0\0\0\22\40\192" .. string.char(12 + #question + 18)
    for _, bytes in ipairs {
      "", "short", message(8, 0, question, {}), dns.question(7, "a.b"),
      message(7, 0, question, { loop }),
      message(7, 0, "\192\12\0\33\0\1", {}),
      message(7, 0, question, { "\192\12\0\33\0\1\0\0\0\60\255\255" }),
      message(7, 0, question, { "\192\12\0\33\0\1\0\0\0\60\0\3\0\0\0" }),
      message(7, 0, question, { "\192\12\0\33\0\1\0\0\0\60\0\9\0\0\0\0\22\40\70ab" }),
      message(7, 0, question, { { 1, 1, 1, "a.b" } }):sub(1, -3),
    } do
      assert.same({ nil, "nonsense" }, { dns.answer(bytes, 7) })
    end
  end)

  it("survive any bytes", function()
    local draw = chance(20240607)
    local good = message(7, 0, question, { { 10, 5, 5672, "a.example.com" }, { 10, 5, 5672, "b.example.com" } })
    for _ = 1, 5000 do
      local at = math.floor(draw() * #good) + 1
      local bytes = good:sub(1, at - 1) .. string.char(math.floor(draw() * 256)) .. good:sub(at + 1)
      dns.answer(draw() < 0.5 and bytes or bytes:sub(1, math.floor(draw() * #bytes)), 7)
    end
  end)

  it("hold names that are names", function()
    assert.is_true(dns.is_name "_amqp._tcp.example.com.")
    for _, bad in ipairs { "", ".", "a..b", ("x"):rep(64), ("abc."):rep(70) } do
      assert.is_false(dns.is_name(bad), bad)
    end
  end)
end)

describe("SRV records", function()
  local function record(priority, weight, target) return { priority = priority, weight = weight, target = target } end

  it("are tried by priority, and within one by weight", function()
    local draw, firsts = chance(1), {}
    for _ = 1, 2000 do
      local ordered = dns.order({ record(20, 0, "backup"), record(10, 30, "big"), record(10, 10, "small") }, draw)
      assert.equal("backup", ordered[3].target)
      firsts[ordered[1].target] = (firsts[ordered[1].target] or 0) + 1
    end
    assert.truthy(firsts.big > 1350 and firsts.big < 1600, firsts.big)
  end)

  it("of weight 0 have their turn", function()
    local draw, seen = chance(1), {}
    for _ = 1, 200 do seen[dns.order({ record(1, 0, "a"), record(1, 1, "b") }, draw)[1].target] = true end
    assert.same({ a = true, b = true }, seen)
  end)
end)

describe("the resolver", function()
  local servers = {}
  local function start(zone)
    local server = dns_server.start(zone)
    servers[#servers + 1] = server
    return server
  end
  after_each(function()
    for _, server in ipairs(servers) do server.stop() end
    servers = {}
  end)

  local function lookup(text, list, more)
    local opts = { servers = list, search = {}, timeout = 5 }
    for key, value in pairs(more or {}) do opts[key] = value end
    return resolver.srv(native, text, opts, chance(1))
  end

  it("reads resolv.conf", function()
    assert.same({ servers = { "10.0.0.2", "fe80::1%eth0" }, search = { "a.b", "c" }, ndots = 5 }, resolver.parse [[
# comment
nameserver 10.0.0.2
nameserver nonsense here
nameserver fe80::1%eth0
domain x
search a.b c
options ndots:5 rotate]])
    assert.same({ servers = {}, search = {}, ndots = 1 }, resolver.parse "")
  end)

  it("knows addresses of servers", function()
    assert.same({ host = "127.0.0.1", port = 8600 }, resolver.server "127.0.0.1:8600")
    assert.same({ host = "::1", port = 53 }, resolver.server "::1")
    assert.same({ host = "::1", port = 5353 }, resolver.server "[::1]:5353")
    for _, bad in ipairs { "", "name", "1.2.3.4:0", "1.2.3.4:70000", "[::1" } do assert.is_nil(resolver.server(bad)) end
  end)

  it("tries the search list as the C library does", function()
    local conf = { search = { "ns.svc", "svc." }, ndots = 3 }
    assert.same({ "_a._tcp.x.ns.svc", "_a._tcp.x.svc", "_a._tcp.x" }, resolver.candidates("_a._tcp.x", conf))
    assert.same({ "_a._tcp.x.y", "_a._tcp.x.y.ns.svc", "_a._tcp.x.y.svc" }, resolver.candidates("_a._tcp.x.y", conf))
    assert.same({ "_a._tcp.x" }, resolver.candidates("_a._tcp.x.", conf))
  end)

  it("finds hosts and ports", function()
    local records = { { 2, 0, 5673, "b.example.com" }, { 1, 0, 5672, "a.example.com" } }
    local server = start { ["_amqp._tcp.example.com"] = records }
    assert.same({ { host = "a.example.com", port = 5672 }, { host = "b.example.com", port = 5673 } },
      (lookup("_amqp._tcp.example.com", { server.address })))
  end)

  it("goes on at the next name when there is none, and at the next server when one fails", function()
    local broken = start { ["_a._tcp.x.test"] = 2, ["_a._tcp.x"] = 2 }
    local good = start { ["_a._tcp.x.test"] = { { 1, 1, 1, "h" } } }
    local found = lookup("_a._tcp.x", { broken.address, good.address }, { search = { "test" } })
    assert.same({ { host = "h", port = 1 } }, found)
    assert.same({ "_a._tcp.x", "_a._tcp.x.test" }, good.asked)
  end)

  it("says why there is none", function()
    local server = start {
      ["_a._tcp.empty"] = {}, ["_a._tcp.broken"] = 2, ["_a._tcp.lies"] = function() return "?" end,
    }
    local function why(text, list)
      local found, problem = lookup(text, list or { server.address })
      assert.is_nil(found)
      return problem
    end
    assert.equal("no SRV records of _a._tcp.none: NXDOMAIN", why "_a._tcp.none")
    assert.equal("no SRV records of _a._tcp.empty: it has no SRV records", why "_a._tcp.empty")
    assert.matches("127.0.0.1:%d+: SERVFAIL", why "_a._tcp.broken")
    assert.matches("nonsense", why "_a._tcp.lies")
    assert.matches("no address", why("_a._tcp.none", { "not an address" }))
    assert.matches("refused", why("_a._tcp.none", { "127.0.0.1:1" }))
    assert.matches("no name", why "a..b")
  end)

  it("does not wait for ever, and lets others run meanwhile", function()
    local server = start { ["_a._tcp.slow"] = function() end }
    local turns = 0
    native.run(function()
      local over
      native.spawn(function()
        while not over do
          turns = turns + 1
          native.sleep(0.001)
        end
      end)
      local found, problem = lookup("_a._tcp.slow", { server.address }, { timeout = 0.6 })
      over = true
      assert.is_nil(found)
      assert.matches("timeout", problem)
    end)
    assert.truthy(turns > 2)
  end)
end)

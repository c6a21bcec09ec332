local uri = require "moonrabbit.uri"

describe("uri", function()
  local function parse(text)
    local parsed, problem = uri.parse(text)
    assert(parsed, problem)
    return parsed
  end

  it("knows the parts", function()
    local p = parse "amqp://us%40er:p%3Ass%2Fw%23@rabbit.example:5673/v%2Fhost?heartbeat=7"
    assert.equal("us@er", p.user)
    assert.equal("p:ss/w#", p.password)
    assert.equal("rabbit.example", p.host)
    assert.equal(5673, p.port)
    assert.equal("v/host", p.vhost)
    assert.equal(7, p.heartbeat)
    assert.is_nil(p.tls)
  end)

  it("has defaults", function()
    for _, text in ipairs { "amqp://", "amqp:///", "AMQP://localhost", "amqp://localhost:5672/", "amqp://:5672" } do
      local p = parse(text)
      assert.equal("localhost", p.host)
      assert.equal(5672, p.port)
      assert.equal("/", p.vhost)
      assert.is_nil(p.user)
      assert.is_nil(p.password)
    end
    assert.equal(5671, parse("amqps://h").port)
    assert.is_true(parse("amqps://h").tls.verify)
  end)

  it("tells a port that is named from the default", function()
    for _, text in ipairs { "amqp://h:5672", "amqps://h:5671/v", "amqp://u:p@:1", "amqp://[::1]:5672" } do
      assert.is_true(parse(text).port_given, text)
    end
    -- A password that looks like a port is none, nor is a colon without one.
    for _, text in ipairs { "amqp://", "amqps://h/v", "amqp://guest:5672@h/", "amqp://h:/", "amqp://[::1]",
      "amqp://%2Frun%2Frabbit.sock" } do
      assert.is_false(parse(text).port_given, text)
    end
  end)

  it("takes an empty path, / and /%2f for the vhost /", function()
    for _, path in ipairs { "", "/", "/%2f", "/%2F" } do assert.equal("/", parse("amqp://h" .. path).vhost) end
    assert.equal("a b", parse("amqp://h/a%20b").vhost)
    assert.equal("x@y:z", parse("amqp://h/x@y:z").vhost)
  end)

  it("tells an empty user or password from none", function()
    local p = parse "amqp://:@h"
    assert.equal("", p.user)
    assert.equal("", p.password)
    p = parse "amqp://u@h"
    assert.equal("u", p.user)
    assert.is_nil(p.password)
  end)

  it("takes IPv6 addresses in brackets", function()
    assert.equal("::1", parse("amqp://[::1]").host)
    assert.equal("2001:db8::7", parse("amqp://u:p@[2001:db8::7]:99/v").host)
    assert.equal("::ffff:127.0.0.1", parse("amqp://[::ffff:127.0.0.1]").host)
    assert.equal("fe80::1%eth0", parse("amqp://[fe80::1%25eth0]").host)
    assert.equal("[::1]:5672", uri.endpoint(parse "amqp://[::1]"))
    for _, bad in ipairs { "[::1", "[::g]", "[1:2]", "[]", "[::1]x", "[:::]", "[1::2::3]", "[1:2:3:4:5:6:7:8:9]",
      "[::256.0.0.1]", "[12345::]", "::1", "[::1%25]" } do
      assert.is_nil((uri.parse("amqp://" .. bad .. "/")), bad)
    end
  end)

  it("takes unix sockets", function()
    local p = parse "amqp://u:p@%2Frun%2Frabbit.sock/v"
    assert.equal("/run/rabbit.sock", p.path)
    assert.equal("/run/rabbit.sock", uri.endpoint(p))
    assert.is_nil(p.port)
  end)

  it("takes RabbitMQ's query parameters", function()
    local p = parse("amqps://h?heartbeat=5&connection_timeout=10000&channel_max=7&frame_max=8192"
      .. "&cacertfile=/ca%20x.pem&certfile=/c.pem&keyfile=/k.pem&verify=verify_none"
      .. "&server_name_indication=other&auth_mechanism=external&auth_mechanism=plain&fail_if_no_peer_cert=true")
    assert.equal(5, p.heartbeat)
    assert.equal(10, p.connect_timeout)
    assert.equal(7, p.channel_max)
    assert.equal(8192, p.frame_max)
    assert.same({ ca = "/ca x.pem", cert = "/c.pem", key = "/k.pem", verify = false, server_name = "other" }, p.tls)
    assert.equal("EXTERNAL", p.mechanism)
    assert.equal(0, parse("amqp://h?heartbeat=0").heartbeat)
    assert.equal(0, parse("amqp://h?frame_max=0").frame_max)
  end)

  it("refuses bad query parameters, naming them", function()
    local bad = {
      ["amqp://h?heartbeat=x"] = "'heartbeat' must be an integer",
      ["amqp://h?heartbeat=-1"] = "'heartbeat'",
      ["amqp://h?heartbeat=65536"] = "'heartbeat'",
      ["amqp://h?heartbeat"] = "'heartbeat'",
      ["amqp://h?frame_max=4095"] = "'frame_max' must be an integer from 4096",
      ["amqp://h?hartbeat=1"] = "did you mean 'heartbeat'",
      ["amqp://h?auth_mechanism=cram"] = "plain, amqplain or external",
      ["amqps://h?verify=maybe"] = "verify_peer or verify_none",
      ["amqp://h?cacertfile=/x"] = "needs an amqps URI",
      ["amqps://h?server_name_indication=disable"] = "verify=verify_none",
    }
    for text, expected in pairs(bad) do
      local p, problem = uri.parse(text)
      assert.is_nil(p, text)
      assert.truthy(problem:find(expected, 1, true), problem)
    end
  end)

  it("refuses what is no AMQP URI", function()
    for _, text in ipairs { "", "amqp", "amqp:", "amqp:/h", "http://h", "amqp://h:0", "amqp://h:65536", "amqp://h:x",
      "amqp://h:1:2", "amqp://a b", "amqp://h/a/b", "amqp://h/%", "amqp://h/%2", "amqp://h/%zz", "amqp://h/%00",
      "amqp://u%00:p@h", "amqp://h#f", "amqp://a@b@h", "amqp://h\n", "amqp://h/" .. ("x"):rep(256),
      "amqp://h_!", "//h", "amqp://h:99999999999999999999" } do
      local p, problem = uri.parse(text)
      assert.is_nil(p, text)
      assert.equal("string", type(problem))
    end
    assert.has_error(function() uri.parse(nil) end)
    assert.has_error(function() uri.parse {} end)
  end)

  it("never shows the password", function()
    for _, text in ipairs { "amqp://u:s3cr3t@h:x", "amqp://u:s3cr3t@x@h", "amqp://u:s3cr3t/x@h", "amqp://u:s3cr3t?x@h",
      "amqp://u:s3cr3t#x@h", "amqp://u:%s3cr3t@h", "amqp://u:s3cr3t x@h", "http://u:s3cr3t@h", "amqp://u:s3cr3t@h/a/b",
      "amqp://u:s3cr3t", "amqp://u:s3cr3t?s3cr3t=s3cr3t@h", "amqp://u:?heartbeatz=s3cr3t@h" } do
      local p, problem = uri.parse(text)
      assert.is_nil(p, text)
      assert.is_nil(problem:find("s3cr3t", 1, true), problem)
    end
    local p = parse "amqps://us%40er:s3cr3t@h/v%2Fw?keyfile=/s3cr3t"
    assert.equal("amqps://us%40er@h:5671/v%2Fw", uri.redacted(p))
  end)

  it("may name a service of DNS", function()
    local p = assert(uri.parse "amqp+srv://me:pw@_rabbit._tcp.example.com/v?heartbeat=5")
    assert.equal("_rabbit._tcp.example.com", p.srv)
    assert.is_nil(p.port)
    assert.equal("v", p.vhost)
    assert.equal("amqp+srv://me@_rabbit._tcp.example.com/v", uri.redacted(p))
    assert.equal("_amqp._tcp.example.com", assert(uri.parse "AMQP+SRV://example.com").srv)
    local secure = assert(uri.parse "amqps+srv://example.com/?verify=verify_none")
    assert.equal("_amqps._tcp.example.com", secure.srv)
    assert.is_false(secure.tls.verify)
    for _, text in ipairs { "amqp+srv://example.com:5672", "amqp+srv://127.0.0.1", "amqp+srv://[::1]",
      "amqp+srv://", "amqps+srv://me:pw@/v", "amqp+srv://:", "amqp+srv://%2Frun%2Fx", "amqp+srv+srv://example.com",
      "http+srv://example.com" } do
      assert.is_nil(uri.parse(text), text)
    end
  end)

  it("survives random input", function()
    local pieces = { "amqp", "amqps", "://", ":", "/", "@", "?", "&", "=", "%", "%2f", "%00", "[", "]", "::1", "host",
      "5672", "heartbeat", "verify", "\0", "\255", " ", "#", "é", "guest", "verify_none", "127.0.0.1", "-", "_", "." }
    local seed = tonumber(os.getenv "SEED") or 20240607
    local function random(n)
      seed = (seed * 16807) % 2147483647
      return seed % n + 1
    end
    for _ = 1, 20000 do
      local parts = { random(4) > 1 and "amqp://" or "" }
      for i = 1, random(12) do parts[i + 1] = pieces[random(#pieces)] end
      local text = table.concat(parts)
      local p, problem = uri.parse(text)
      if p then
        assert.truthy(p.path or (#p.host > 0 and p.port >= 1 and p.port <= 65535), text)
        assert.truthy(#p.vhost <= 255)
        -- What it says of itself is a URI of the same place.
        local again = uri.parse(uri.redacted(p))
        if not p.path and not p.host:find "[\128-\255%%]" then
          assert.truthy(again, text)
          assert.equal(p.host, again.host)
          assert.equal(p.vhost, again.vhost)
        end
      else
        assert.equal("string", type(problem), text)
      end
    end
  end)
end)

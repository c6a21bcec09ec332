-- TLS against a broker with a test CA (scripts/broker start tls).
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local ok = broker.ok

describe("tls", function()
  if not broker.tls_url then pending "AMQPS_URL is not set: no broker with TLS" return end

  local dir = broker.tls_dir
  after_each(broker.close_all)

  local function refused(opts)
    opts.uri = opts.uri or broker.tls_url
    opts.connect_timeout = 5
    local conn, err = moonrabbit.connect(opts)
    if conn then conn:close() end
    assert.is_nil(conn)
    return err
  end

  it("connects with the right CA, and works", function()
    local conn = broker.connect { uri = broker.tls_url, tls = { ca = dir .. "/ca.pem" } }
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    local body = ("secret "):rep(100000)
    ok(ch:publish(body, { routing_key = queue }))
    local consumer = ok(ch:consume(queue))
    assert.is_true(ok(consumer:receive(5)).body == body)
    for i = 1, 500 do ok(ch:publish_async("m" .. i, { routing_key = queue })) end
    ok(ch:wait_for_confirms(10))
    for _ = 1, 500 do ok(consumer:receive(5)):ack() end
  end)

  it("takes the CA from the URI", function()
    local base = broker.tls_url
    broker.connect { uri = base .. "?cacertfile=" .. dir .. "/ca.pem&verify=verify_peer" }
  end)

  it("refuses a certificate that it cannot trust", function()
    local err = refused {}
    assert.equal("tls", err.kind)
    assert.is_false(err.temporary)
    err = refused { tls = { ca = dir .. "/other-ca.pem" } }
    assert.equal("tls", err.kind)
    assert.is_false(err.temporary)
    assert.matches("certificate", err.message)
  end)

  it("refuses a certificate for another name", function()
    local err = refused { tls = { ca = dir .. "/ca.pem", server_name = "elsewhere.example" } }
    assert.equal("tls", err.kind)
    assert.is_false(err.temporary)
  end)

  it("verifies nothing when told so", function()
    broker.connect { uri = broker.tls_url, tls = { verify = false } }
    broker.connect { uri = broker.tls_url .. "?verify=verify_none" }
  end)

  it("logs in by client certificate", function()
    local conn = broker.connect { uri = broker.tls_url, mechanism = "EXTERNAL",
      tls = { ca = dir .. "/ca.pem", cert = dir .. "/client.pem", key = dir .. "/client.key" } }
    ok(ok(conn:channel()):queue_declare("", { exclusive = true }))
  end)

  it("says when EXTERNAL has no certificate to show, or a foreign one", function()
    local err = refused { mechanism = "EXTERNAL", tls = { ca = dir .. "/ca.pem" } }
    assert.equal("auth", err.kind)
    err = refused { mechanism = "EXTERNAL",
      tls = { ca = dir .. "/ca.pem", cert = dir .. "/other-client.pem", key = dir .. "/other-client.key" } }
    assert.truthy(err.kind == "tls" or err.kind == "auth" or err.kind == "closed", err.kind)
  end)

  it("says when a file is not there", function()
    local err = refused { tls = { ca = dir .. "/no-such-file.pem" } }
    assert.equal("tls", err.kind)
    assert.matches("no%-such%-file", err.message)
  end)

  it("says when there is no TLS at that port", function()
    local p = broker.parsed()
    local err = refused { uri = ("amqps://%s:%d/"):format(p.host, p.port), tls = { verify = false } }
    assert.truthy(err.kind == "tls" or err.kind == "closed", err.kind)
  end)

  it("says when there is TLS at a port where none was asked for", function()
    local p = moonrabbit.uri.parse(broker.tls_url)
    local err = refused { uri = ("amqp://%s:%d/"):format(p.host, p.port) }
    assert.truthy(err.kind == "protocol" or err.kind == "closed", err.kind)
  end)

  it("asks for a newer version", function()
    broker.connect { uri = broker.tls_url, tls = { ca = dir .. "/ca.pem", min_version = "1.3" } }
    assert.has_error(function() moonrabbit.connect { uri = broker.tls_url, tls = { min_version = "1.1" } } end)
  end)
end)

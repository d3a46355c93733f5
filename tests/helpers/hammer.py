"""Scrape as fast as possible, and print {"answers": N, "seconds": [of each]}.

    python hammer.py PORT CLIENTS SECONDS

It runs in a process of its own, so that its threads do not compete with the server for one interpreter's
lock.
"""

import http.client
import json
import sys
import threading
import time


def hammer(port, deadline, keep_alive, seconds):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while time.monotonic() < deadline:
        begin = time.perf_counter()
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            assert answer.status == 200
            assert b"cmtrain_step" in answer.read()
        except (ConnectionError, http.client.HTTPException):  # dropped to make room for another client
            connection.close()
            continue
        seconds.append(time.perf_counter() - begin)
        if not keep_alive:
            connection.close()
    connection.close()


if __name__ == "__main__":
    port, clients, duration = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    seconds: list[float] = []
    deadline = time.monotonic() + duration
    threads = [
        threading.Thread(target=hammer, args=(port, deadline, n % 2 == 0, seconds)) for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"answers": len(seconds), "seconds": seconds}))
